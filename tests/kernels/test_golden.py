"""Outputs recorded from stock eager: they check the contract on every host, whatever its own torch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kvkern
from kvkern.contract import stock_key_run
from tests.support.bits import differing

GOLDEN = load_file(Path(__file__).parent / "golden" / "stock.safetensors")
CASES = sorted({name.partition(".")[0] for name in GOLDEN})


def recorded(case: str) -> tuple[torch.Tensor, ...]:
    return tuple(GOLDEN[f"{case}.{name}"] for name in ("q", "k", "v", "out"))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_run) -> torch.Tensor:
    return kvkern.prefix_attention(q, kvkern.KVView.from_dense(k, v, query_len=q.shape[2]), key_run=key_run)


@pytest.mark.parametrize("case", CASES)
def test_bits_golden__recorded_stock_outputs(case: str) -> None:
    q, k, v, out = recorded(case)
    run = stock_key_run(q.shape[2], k.shape[2])
    assert differing(attend(q, k, v, "stock"), out) == 0
    assert differing(attend(q, k, v, run), out) == 0


def test_bits_golden__the_other_run_length_fails() -> None:
    count = 0
    for case in CASES:
        q, k, v, out = recorded(case)
        count += differing(attend(q, k, v, 1536 - stock_key_run(q.shape[2], k.shape[2])), out)
    assert count > 0


@pytest.mark.parametrize("case", CASES)
def test_bits_golden__a_flipped_bit_fails(case: str) -> None:
    q, k, v, out = recorded(case)
    v = v.clone()
    v.view(torch.int16)[:, :, 1] ^= 1 << 6
    assert differing(attend(q, k, v, "stock"), out) > 0
