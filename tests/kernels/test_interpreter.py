"""The lean interpreter computes what Triton's own does, and leaves it as it was."""

from __future__ import annotations

import pytest
import torch
import triton

from kvkern.kernels import fast
from tests.support.bits import differing
from tests.support.fast import attend, readers_of_one_prefix
from tests.support.interpreter import PLACES, STOCK, lean_interpreter, stock_interpreter
from tests.support.views import shared_view


def test_bits_lean__as_triton_has_it() -> None:
    if isinstance(fast.fast_kernel, triton.JITFunction):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    q, k, v = readers_of_one_prefix(2, 330, 300, cancels=True)
    kv = shared_view(k, v, 300, [1, 1])
    with stock_interpreter():
        expected, expected_lse = attend(q, kv, return_lse=True)
    with lean_interpreter():
        out, lse = attend(q, kv, return_lse=True)
    assert differing(out, expected) == 0
    assert torch.equal(lse.view(torch.int32), expected_lse.view(torch.int32))


def test_lean__is_undone() -> None:
    def places() -> list[object]:
        return [getattr(owner, name) for owner, name in PLACES]

    with stock_interpreter():
        with lean_interpreter():
            assert all(now is not stock for now, stock in zip(places(), STOCK, strict=True))
        assert all(now is stock for now, stock in zip(places(), STOCK, strict=True))
