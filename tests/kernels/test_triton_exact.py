"""The Triton kernels in the interpreter: the C reference's bits, whatever the shape, the keys' place or the launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import kvkern
from kvkern.kernels import (
    exact_output,
    exact_rows,
    exact_score,
    exact_softmax,
    native,
    ops,
    primitives,
    triton_door,
)
from kvkern.kernels.launch_config import ExactConfig, exact_config
from kvkern.view import KVView, append
from tests.support.bits import differing
from tests.support.exact import BASE, CONFIGS, attend, cancelling, same_as_c
from tests.support.interpreter import needs_interpreter
from tests.support.stock import eager_attention, needs_stock_order
from tests.support.views import int32, paged_view, random_qkv, shared_view

pytestmark = needs_interpreter
LONG = [pytest.mark.long, pytest.mark.slow]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("batch", "group", "kv_heads", "head_dim", "rows", "columns"),
    [
        pytest.param(1, 4, 1, 128, 1, 66, id="B1-Q4-KV1-D128-Tq1-T66"),
        pytest.param(2, 3, 1, 64, 1, 70, id="B2-Q3-KV1-D64-Tq1-T70"),
        pytest.param(1, 1, 1, 96, 3, 70, id="B1-Q1-KV1-D96-Tq3-T70"),
        pytest.param(1, 8, 1, 256, 1, 20, id="B1-Q8-KV1-D256-Tq1-T20"),
        pytest.param(1, 2, 1, 64, 3, 17, id="B1-Q2-KV1-D64-Tq3-T17"),
        pytest.param(1, 4, 2, 128, 1, 130, id="B1-Q8-KV2-D128-Tq1-T130", marks=LONG),
        pytest.param(1, 1, 2, 96, 9, 200, id="B1-Q2-KV2-D96-Tq9-T200", marks=LONG),
        pytest.param(1, 8, 1, 256, 2, 66, id="B1-Q8-KV1-D256-Tq2-T66", marks=LONG),
    ],
)
def test_bits_triton__shapes(config: ExactConfig, batch, group, kv_heads, head_dim, rows, columns) -> None:
    q, k, v = cancelling(batch, group, rows, columns, head_dim, kv_heads)
    assert same_as_c(q, KVView.from_dense(k, v, query_len=rows), config=config) == 0


@pytest.mark.parametrize("prefix_len", [0, 1, 63, 64, 65, 256, 257])
def test_bits_triton__either_side_of_the_prefix_edge(prefix_len: int) -> None:
    q, k, v = cancelling(1, 1, 2, 280, 64)
    kv = shared_view(k, v, prefix_len, [2], seed=prefix_len, layers=3, layer=1, spare_tiles=1)
    config = CONFIGS["narrow" if prefix_len == 65 else "middle"]
    assert same_as_c(q, kv, config=config) == 0


@pytest.mark.parametrize("key_run", ["stock", 512, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1100), (2, 1030), (2, 513)])
def test_bits_triton__run_edges(key_run, rows: int, columns: int) -> None:
    q, k, v = cancelling(1, 2, rows, columns, 64)
    kv = shared_view(k, v, 600, [rows])
    config = CONFIGS["middle" if rows == 1 else "shipped"]
    assert same_as_c(q, kv, config=config, key_run=key_run) == 0


def test_bits_triton__key_run_matters_here() -> None:
    """The twin: with another run the same data give other bits."""
    q, k, v = random_qkv(1, 2, 1, 1, 1100, 64, spread=0.0)
    v[:, :, 10], v[:, :, 1000] = 1024.0, -1024.0
    kv = shared_view(k, v, 600, [1])
    assert same_as_c(q, kv, key_run=512) == 0 == same_as_c(q, kv, key_run=1024)
    assert differing(attend(q, kv, key_run=512), kvkern.prefix_attention(q, kv, key_run=1024)) > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bits_triton__ragged_readers_of_several_prefixes(config: ExactConfig) -> None:
    _, k, v = random_qkv(4, 1, 1, 1, 400, 64, seed=1)
    q = random_qkv(4, 1, 1, 2, 16, 64, spread=2.0, seed=2)[0]
    prefixes = [(k[0, :, :257], v[0, :, :257]), (k[1, :, :64], v[1, :, :64])]
    suffixes = [(k[b, :, :n], v[b, :, :n]) for b, n in enumerate((5, 90, 1, 64))]
    kv = paged_view(prefixes, [1, 0, 0, 1], suffixes, [2, 1, 1, 0], layers=2, layer=1, spare_tiles=1)
    assert same_as_c(q, kv, config=config) == 0


def test_bits_triton__any_block_table_and_any_split() -> None:
    q, k, v = cancelling(1, 1, 3, 600, 64)
    expected = kvkern.prefix_attention(q, shared_view(k, v, 520, [3]))
    for seed, queries in ((0, 2), (1, 3)):
        kv = shared_view(k, v, 520, [3], seed=seed)
        bound = triton_door.scratch_layout(queries, 64, 15, BASE).nbytes
        assert differing(attend(q, kv, scratch_bound_bytes=bound), expected) == 0


def test_bits_triton__odd_inputs() -> None:
    q, k, v = random_qkv(4, 2, 1, 1, 40, 64)
    k[0, 0, 5, 3] = float("nan")
    k[1, 0, 7] = float("inf")
    q[2], k[2, 0, :, :] = 1.0, -torch.inf
    k[3, 0, 9] = -1e38
    q[3] = 1e3
    kv = KVView.from_dense(k, v)
    out = attend(q, kv)
    assert differing(out, kvkern.prefix_attention(q, kv)) == 0
    assert out[:3].isnan().all() and not out[3].isnan().any()


@needs_stock_order
@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (3, 60)])
def test_bits_triton__stock_eager_itself(rows: int, columns: int) -> None:
    q, k, v = random_qkv(1, 2, 1, rows, columns, 64, spread=3.0)
    assert differing(attend(q, KVView.from_dense(k, v, query_len=rows)), eager_attention(q, k, v)) == 0


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942"])
def test_bits_triton__shipped_configurations(target: str) -> None:
    """All but the assembly: what a GPU's caches are asked for."""
    config = replace(exact_config(target), pull=False, warm=False)
    q, k, v = cancelling(1, 4, 1, 2100, 64)
    assert same_as_c(q, shared_view(k, v, 2000, [1]), config=config) == 0


def test_bits_triton__a_key_that_one_row_of_a_program_does_not_see() -> None:
    """The first row sees 256 keys, all that its softmax takes at once; the place of the next holds p, not its score."""
    config = replace(CONFIGS["middle"], softmax_passes=1)
    q, k, v = random_qkv(1, 1, 1, 2, 257, 32)
    k[:, :, -1] = float("nan")
    kv = KVView.from_dense(k, v, query_len=2)
    out = attend(q, kv, config=config)
    assert not out[:, 0].isnan().any() and out[:, 1].isnan().all()
    assert differing(out, kvkern.prefix_attention(q, kv)) == 0


def test_lse_triton__natural_logarithm() -> None:
    q, k, v = random_qkv(2, 1, 1, 3, 100, 64, spread=3.0)
    kv = replace(KVView.from_dense(k, v, query_len=3), query_len=int32(3, 1))
    lse = kvkern.prefix_attention(q, kv, return_lse=True, backend="triton")[1]
    expected = kvkern.prefix_attention(q, kv, return_lse=True)[1]
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    finite = expected > -torch.inf
    assert (lse[finite] - expected[finite]).abs().max() < 2e-6


def test_bits_exp__as_c_has_it_and_no_library() -> None:
    """exp_c of primitives.py against C's, over the whole range of bf16 scores and some that are finer."""

    @triton.jit
    def kernel(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, primitives.exp_c(tl.load(x_ptr + i)))

    coarse = -torch.arange(1, 0x7F81, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().abs()
    fine = -torch.rand(1 << 15, generator=torch.Generator().manual_seed(0)) * 110
    x = torch.cat([coarse, fine, torch.tensor([0.0, -104.0, -torch.inf])])
    x = torch.cat([x, x.new_zeros((1 << x.numel().bit_length()) - x.numel())])
    ours, theirs, libraries = torch.empty_like(x), torch.empty_like(x), x.exp()
    kernel[(1,)](x, ours, x.numel())
    native.library().kv_exp(x.data_ptr(), theirs.data_ptr(), x.numel())
    assert int((ours.view(torch.int32) != theirs.view(torch.int32)).sum()) == 0
    assert int((libraries.view(torch.int32) != theirs.view(torch.int32)).sum()) > 1000


@triton.jit
def _pairwise(lanes):
    return tl.sum(tl.sum(tl.sum(tl.sum(tl.reshape(lanes, (8, 2)), axis=1).reshape(4, 2), axis=1).reshape(2, 2), axis=1))


@triton.jit
def _halve_kernel(x_ptr, y_ptr, WRONG: tl.constexpr):
    lanes = tl.load(x_ptr + tl.program_id(0) * 16 + tl.arange(0, 16))
    tl.store(y_ptr + tl.program_id(0), _pairwise(lanes) if WRONG else primitives.halve16(lanes))


def test_bits_halve16__halves_and_no_other_order() -> None:
    lanes = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    expected = lanes.clone()
    for half in (8, 4, 2, 1):
        expected = expected[:, :half] + expected[:, half : 2 * half]
    ours, wrong = torch.empty(200), torch.empty(200)
    _halve_kernel[(200,)](lanes, ours, False)
    _halve_kernel[(200,)](lanes, wrong, True)
    assert torch.equal(ours, expected[:, 0]) and not torch.equal(wrong, expected[:, 0])


@triton.jit
def _score_kernel(x_ptr, y_ptr, WRONG: tl.constexpr):
    total = tl.load(x_ptr + tl.arange(0, 4))
    if WRONG:
        rounded = primitives.round16(primitives.round16(total) * 0.125)
        bits = primitives.round16(rounded + 0.0).to(tl.int32, bitcast=True)
    else:
        bits = exact_score.score_bits(total, 0.125)
    tl.store(y_ptr + tl.arange(0, 4), bits)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bits_score__a_gpus_nan_stays_one() -> None:
    """NVIDIA's arithmetic makes the NaN 0x7fffffff; rounding alone carries over into the sign and leaves zero."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x3F808000, -0x80000000], dtype=torch.int32)
    ours, wrong = torch.empty_like(bits), torch.empty_like(bits)
    _score_kernel[(1,)](bits.view(torch.float32), ours, False)
    _score_kernel[(1,)](bits.view(torch.float32), wrong, True)
    assert ours.tolist() == [0x7FC00000, 0x7FC00000, 0x3E000000, 0]
    assert wrong.tolist()[0] == 0


@triton.jit
def _unrounded(value):
    return value


def test_bits_triton__unrounded_scores_and_probabilities_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, 8, 1, 2, 100, 64, spread=3.0)
    kv = KVView.from_dense(k, v, query_len=2)
    for module in (exact_score, exact_softmax):
        with monkeypatch.context() as patch:
            patch.setattr(module, "round16", _unrounded)
            assert same_as_c(q, kv) > 0


def test_bits_triton__re_associated_chains_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before odd, as a careless dot product would: other bits."""
    for module in (exact_rows, exact_score):
        monkeypatch.setattr(module, "widen_low", primitives.widen_high)
        monkeypatch.setattr(module, "widen_high", primitives.widen_low)
    q, k, v = random_qkv(1, 4, 1, 1, 300, 64, spread=2.0)
    assert same_as_c(q, KVView.from_dense(k, v)) > 0


@triton.jit
def _backwards(sums, runs, most_runs, stride, inside, RUNS: tl.constexpr):
    even, odd = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
    for i in range(0, most_runs):
        run = most_runs - 1 - i
        pair = tl.load(sums + run * stride, mask=inside & (run < runs), other=0)
        even, odd = even + exact_rows.first_of(pair), odd + exact_rows.second_of(pair)
    return even, odd


@triton.jit
def _bare(words, seen, TILES: tl.constexpr):
    return words


def test_bits_triton__run_sums_backwards_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, 1, 1, 1, 1040, 32, spread=0.0)
    v[:, :, :512], v[:, :, 512:1024] = 1e30, -1e30  # flat scores: these cancel, if they are added before the rest
    kv = KVView.from_dense(k, v)
    assert same_as_c(q, kv) == 0
    monkeypatch.setattr(exact_output, "_fold", _backwards)
    assert same_as_c(q, kv) > 0


def test_bits_triton__keys_that_are_not_hidden_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, 1, 1, 2, 70, 32)
    v[:, :, -1] = float("nan")
    kv = KVView.from_dense(k, v, query_len=2)
    first = attend(q, kv)[:, 0]  # does not see the last key
    assert not first.isnan().any() and differing(first, kvkern.prefix_attention(q, kv)[:, 0]) == 0
    monkeypatch.setattr(exact_output, "_hide", _bare)
    assert attend(q, kv)[:, 0].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_bits_append__tokens_land_where_c_puts_them(head_dim: int) -> None:
    k, v = torch.randn(2, 3, 2, 5, head_dim).bfloat16()
    first, count = int32(62, 0, 130), int32(5, 0, 3)
    shapes = (3, 2, 3, head_dim, 64), (3, 2, 3, 64, head_dim)
    ours = [torch.full(shape, 7.0, dtype=torch.bfloat16) for shape in shapes]
    theirs = [tensor.clone() for tensor in ours]
    ops.append(k, v, *ours, first, count)
    append(k, v, *theirs, first, count)
    assert all(differing(a, b) == 0 for a, b in zip(ours, theirs, strict=True))


def test_bits_triton__no_room_for_keys_and_an_odd_bound() -> None:
    """A view that lists no tile writes +0; any bound of the scratch is one."""
    q, k, v = random_qkv(1, 1, 1, 3, 70, 64)
    assert same_as_c(q, KVView.from_dense(k, v, query_len=3), scratch_bound_bytes=7425) == 0
    empty = KVView.from_dense(k[:, :, :0], v[:, :, :0], query_len=0)
    empty = replace(empty, suffix_k=empty.suffix_k[:, :, :0], suffix_v=empty.suffix_v[:, :, :0])
    assert differing(attend(q, empty), torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)) == 0
