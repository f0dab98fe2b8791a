"""The C reference against Hugging Face's eager attention, by bits; and mutated twins of the C that must fail."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import kvkern
from kvkern.contract import stock_key_run
from kvkern.kernels import native
from tests.support.bits import differing
from tests.support.stock import eager_attention, in_parity_domain, needs_stock_order
from tests.support.twins import build_twin
from tests.support.views import random_qkv

pytestmark = needs_stock_order


def attend(q, k, v, **options) -> torch.Tensor:
    """kvkern over dense K and V, its output poisoned before."""
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=torch.bfloat16)
    view = kvkern.KVView.from_dense(k, v, query_len=q.shape[2])
    return kvkern.prefix_attention(q, view, out=out, **options)


def random_case(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A call in the parity domain: columns 16..4096 with weight on the run boundaries, spreads 0 to 6."""
    while True:
        rows = rng.randint(1, 9)
        columns = rng.choice(
            [rng.randint(16, 130), rng.randint(500, 530), rng.randint(1000, 1100), rng.randint(16, 4096)]
        )
        q, k, v = random_qkv(rng.randint(1, 5), rng.choice([1, 3, 4, 8]), rng.choice([1, 2]), rows, max(rows, columns),
                             rng.choice([64, 128]), spread=rng.uniform(0, 6), seed=rng.getrandbits(32))  # fmt: skip
        if in_parity_domain(q, k):
            return q, k, v


def compare(outputs: int, seed: int) -> tuple[int, int]:
    """Compare random calls until `outputs` are compared; return (differing, compared)."""
    rng, bad, total = random.Random(seed), 0, 0
    while total < outputs:
        q, k, v = random_case(rng)
        expected = eager_attention(q, k, v)
        bad += differing(attend(q, k, v, scratch_bound_bytes=rng.choice([1, 1 << 20, 64 << 20])), expected)
        total += expected.numel()
        if stock_key_run(q.shape[2], k.shape[2]) == 512:
            bad += differing(attend(q, k, v, key_run=512), expected)
    return bad, total


def test_bits_stock__random_calls() -> None:
    assert compare(500_000, seed=1)[0] == 0


@pytest.mark.long
def test_bits_stock__ten_million_outputs() -> None:
    bad, total = compare(10_000_000, seed=2)
    print(f"{bad} of {total} outputs differ")
    assert bad == 0


@pytest.mark.parametrize("columns", [16, 17, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 1100, 1300])
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (4, 128)], ids=["G3-D64", "G4-D128"])
def test_bits_stock__one_shot_causal_prefill(columns: int, group: int, head_dim: int) -> None:
    q, k, v = random_qkv(1, group, 1, columns, columns, head_dim, spread=2.0, seed=columns)
    expected = eager_attention(q, k, v)
    assert differing(attend(q, k, v), expected) == 0
    if columns > 1024:
        assert differing(attend(q, k, v, key_run=512), expected) > 0, "stock takes runs of 1024 here"


def test_bits_stock__a_row_of_few_keys_in_a_larger_call() -> None:
    q, k, v = random_qkv(2, 4, 2, 40, 40, 128, spread=3.0)
    expected = eager_attention(q, k, v)
    assert differing(attend(q, k, v)[:, :15], expected[:, :15]) == 0


@pytest.mark.parametrize("head_dim", [80, 96, 112, 160, 192, 256])
def test_bits_stock__head_dim(head_dim: int) -> None:
    q, k, v = random_qkv(2, 5, 1, 3, 700, head_dim, spread=2.0)
    assert differing(attend(q, k, v), eager_attention(q, k, v)) == 0


def test_bits_stock__cancelling_values() -> None:
    """Huge values that cancel within a score and within an output: only the exact order survives."""
    q, k, v = random_qkv(2, 4, 2, 2, 1500, 128)
    k[..., 64:] = -k[..., :64]
    q[..., 64:] = q[..., :64]
    q[..., 5] += 0.25
    v[:, :, 1::2] = -v[:, :, ::2] * 1024
    v[:, :, ::2] *= 1024
    expected = eager_attention(q, k, v)
    assert differing(attend(q, k, v), expected) == 0


# Each twin is csrc_ref with one thing wrong. (file, right, wrong)
TWINS = {
    "even element first": ("chain.h", "int second = 1; second >= 0; second--", "int second = 0; second <= 1; second++"),
    "runs of 256": ("contract.h", "#define KEY_RUN 512", "#define KEY_RUN 256"),
    "long runs of 512": ("contract.h", "#define KEY_RUN_LONG 1024", "#define KEY_RUN_LONG 512"),
    "8 sum lanes": ("contract.h", "#define SUM_LANES 16", "#define SUM_LANES 8"),
    "lanes summed in order": (
        "softmax.h",
        "for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];",
        "if (half == 1) for (int lane = 1; lane < SUM_LANES; lane++) sum[0] += sum[lane];",
    ),
    "division": ("softmax.h", "round16(t[j] * reciprocal)", "round16(t[j] / sum[0])"),
    "p unrounded": ("softmax.h", "round16(t[j] * reciprocal)", "t[j] * reciprocal"),
    "score unrounded": ("attention.c", "round16(round16(sums[r][lane]) *", "round16((sums[r][lane]) *"),
    "run sums right to left": (
        "attention.c",
        "for (int64_t run = 1; run < num_runs; run++)",
        "for (int64_t run = num_runs - 1; run >= 1; run--)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hard_cases() -> list[tuple[torch.Tensor, ...]]:
    """Calls that hang on the last bits: flat scores over many keys, in one row and in several; with stock's outputs."""
    flat = random_qkv(5, 8, 2, 9, 4096, 64, spread=0.5, seed=3)
    flat[2][:, :, 2::4] = -flat[2][:, :, ::4]  # keys nearly cancel in the output
    cases = [flat, random_qkv(5, 4, 2, 1, 3000, 128, spread=0.5, seed=4), random_qkv(2, 4, 1, 4, 3000, 128, seed=5)]
    return [(*case, eager_attention(*case)) for case in cases]


@pytest.mark.parametrize("name", TWINS)
def test_bits_stock__a_wrong_twin_fails(name: str, hard_cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = build_twin(TWINS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(native, "library", lambda: twin)
    counts = [differing(attend(q, k, v), expected) for q, k, v, expected in hard_cases]
    print(f"{name}: {counts} outputs differ")
    assert sum(counts) > 0


def test_bits_stock__hard_cases(hard_cases) -> None:
    assert [differing(attend(q, k, v), expected) for q, k, v, expected in hard_cases] == [0, 0, 0]


# The last bit of an exponential seldom reaches a bf16 output. Stock's softmax shows it in fp32.
EXP_TWINS = {
    "fused differently": ("arith.h", "u = 1.0f + fmaf(s * s, u, s);", "u = 1.0f + ((s * s) * u + s);"),
    "exp by libm": (
        "arith.h",
        "static inline float exp_c(float x) {",
        "static inline float exp_c(float x) {\n return expf(x);",
    ),
    "one constant off by an ulp": ("contract.h", "#define EXP_C2 0x1.555556p-3f", "#define EXP_C2 0x1.555558p-3f"),
}


def softmax_by_contract(t: torch.Tensor, lib: ctypes.CDLL) -> torch.Tensor:
    """A2 to A4 without the last rounding: C's exp_c, numpy's additions in the contract's order. Columns: times 16."""
    x = np.ascontiguousarray((t - t.amax(-1, keepdim=True)).numpy())
    e = np.empty_like(x)
    lib.kv_exp(x.ctypes.data, e.ctypes.data, x.size)
    lanes = np.zeros((len(x), 16), dtype=np.float32)
    for j in range(0, x.shape[1], 16):
        lanes += e[:, j : j + 16]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return torch.from_numpy(e * (np.float32(1) / lanes))


@pytest.mark.parametrize("columns", [16, 64, 1040, 4096])
def test_bits_softmax__fp32(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.cat([torch.randn(60, columns) * 8, torch.randn(4, columns) * 60])
    assert differing(softmax_by_contract(t, native.library()), torch.softmax(t, dim=-1, dtype=torch.float32)) == 0


@pytest.mark.parametrize("name", EXP_TWINS)
def test_bits_softmax__a_wrong_twin_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(60, 1040) * 8
    twin = build_twin(EXP_TWINS[name], tmp_path, monkeypatch)
    assert differing(softmax_by_contract(t, twin), torch.softmax(t, dim=-1, dtype=torch.float32)) > 0
