"""The Triton kernels in the interpreter: the C reference's bits, whatever the shape, the keys' place or the launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import kvkern
from kvkern.attention import KVView, append
from kvkern.kernels import (
    exact,
    exact_output,
    exact_rows,
    exact_score,
    exact_softmax,
    exact_tickets,
    native,
    ops,
    primitives,
    triton_door,
)
from kvkern.kernels.launch_config import ExactConfig, exact_config
from tests.support.bits import differing
from tests.support.stock import eager_attention, needs_stock_order
from tests.support.views import int32, paged_view, random_qkv, shared_view

BASE = exact_config("interpreter")
LONG = [pytest.mark.long, pytest.mark.slow]
# No bit may depend on any of these: programs of one row and of many, of one tile and of many, short and long trips, one
# program a row of the softmax and many.
CONFIGS = {
    "shipped": BASE,
    "narrow": replace(BASE, score_rows=1, output_rows=4, score_words=32, score_unroll=8, softmax_keys=128,
                      softmax_passes=1, softmax_steps=2, output_lanes=128, output_tiles=2, launches=3),
    "middle": replace(BASE, score_rows=3, output_rows=2, score_words=64, score_unroll=16, softmax_keys=256,
                      softmax_passes=2, softmax_steps=4, fold_runs=1, output_lanes=64, lag=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if not triton_door.is_interpreted():
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")


def cancelling(batch: int, group: int, rows: int, columns: int, head_dim: int, kv_heads: int = 1, seed: int = 0):
    """Flat scores, and values of which many cancel: outputs hang on the order of the sums."""
    q, k, v = random_qkv(batch, group, kv_heads, rows, columns, head_dim, spread=0.5, seed=seed)
    v[:, :, 2::4] = -v[:, :, : columns - 2 : 4]
    k[1:, :, : columns - rows - 5] = k[:1, :, : columns - rows - 5]
    v[1:, :, : columns - rows - 5] = v[:1, :, : columns - rows - 5]
    return q, k, v


def attend(q: torch.Tensor, kv: KVView, *, config: ExactConfig = BASE, **options) -> torch.Tensor:
    """Attend with Triton into a poisoned output between guard rows that must stay untouched."""
    options = {"backend": "triton", **options}
    batch, heads, rows, head_dim = q.shape
    guarded = torch.full((batch + 2, rows, heads, head_dim), float("nan"), dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_door, "config_for", lambda device: config)
        kvkern.prefix_attention(q, kv, out=guarded[1:-1], **options)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all(), "wrote outside of out"
    return guarded[1:-1].clone()


@triton.jit
def _place_kernel(out_ptr, sizes_0, sizes_1, sizes_2, KV_HEADS: tl.constexpr, LAG: tl.constexpr):
    ticket = tl.program_id(0)
    phase, head, item = exact_tickets.item_of(ticket, (sizes_0, sizes_1, sizes_2), KV_HEADS, LAG)
    tl.store(out_ptr + 3 * ticket, phase)
    tl.store(out_ptr + 3 * ticket + 1, head)
    tl.store(out_ptr + 3 * ticket + 2, item)


@pytest.mark.parametrize(("kv_heads", "lag"), [(1, 1), (3, 1), (8, 4), (5, 5)])
@pytest.mark.parametrize("sizes", [(4, 3, 5), (1, 1, 1), (7, 0, 0), (0, 2, 0), (0, 0, 3)])
def test_tickets__every_item_once_behind_all_that_it_waits_for(kv_heads: int, lag: int, sizes) -> None:
    """Nobody waits for a later ticket: in whatever order a GPU starts programs, whoever is waited for is running."""
    items = torch.full((kv_heads * sum(sizes), 3), -1, dtype=torch.int32)
    _place_kernel[(len(items),)](items, *sizes, kv_heads, lag)
    found = [tuple(item) for item in items.tolist()]
    assert sorted(found) == [(p, h, i) for p in range(3) for h in range(kv_heads) for i in range(sizes[p])]
    tickets = {item: ticket for ticket, item in enumerate(found)}
    for head in range(kv_heads):
        phases = [[tickets[p, head, i] for i in range(sizes[p])] for p in range(3)]
        for earlier, later in ((0, 1), (1, 2), (0, 2)):
            assert not phases[earlier] or not phases[later] or max(phases[earlier]) < min(phases[later])


@triton.jit
def _divide_kernel(out_ptr, factor: tl.int64, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, exact_tickets.divide(lane, factor))


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 255, 1000, 65537, (1 << 18) - 1])
def test_divide__is_exact(divisor: int) -> None:
    quotients = torch.empty(1 << 20, dtype=torch.int32)
    _divide_kernel[(1,)](quotients, exact_tickets.magic(divisor), quotients.numel())
    assert torch.equal(quotients, torch.arange(quotients.numel(), dtype=torch.int32) // divisor)


@triton.jit
def _arrive_twice(counter):
    return tl.atomic_add(counter, 2)


@pytest.mark.parametrize("queries", [1, 3])
def test_waits__for_all_that_arrive(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """A wait for fewer would read what is not there yet; for more, it would never end.

    Programs run one after the other here, so that at a wait all has arrived that ever will.
    """
    waits: list[tuple[int, int]] = []

    def note(counter: tl.tensor, count: tl.tensor) -> None:
        waits.append(tuple(int(value.handle.data.item()) for value in (tl.load(counter), count)))

    q, k, v = random_qkv(2, 2, 2, queries, 140, 32)
    kv = shared_view(k, v, 100, [queries, queries])
    config = replace(CONFIGS["middle"], pull=True)
    for module in (exact, exact_output):
        for name in ("await_count", "wait_for"):
            monkeypatch.setattr(module, name, note)
    for module in (exact_score, exact_output):
        monkeypatch.setattr(module, "pull", lambda *_: None)
    assert same_as_c(q, kv, config=config) == 0
    assert len(waits) > 8 and all(arrived == count > 0 for arrived, count in waits)
    waits.clear()
    monkeypatch.setattr(exact, "arrive", _arrive_twice)
    attend(q, kv, config=config)
    assert any(arrived != count for arrived, count in waits)


def test_counters__zero_after_calls_and_after_an_aborted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(2, 2, 1, 3, 90, 64)
    kv = KVView.from_dense(k, v, query_len=3)
    expected = kvkern.prefix_attention(q, kv, backend="c")
    bound = triton_door.scratch_layout(2 * 2 * 2, 64, 2, BASE).nbytes  # two positions, then one
    options = {"backend": "triton", "scratch_bound_bytes": bound}
    workspace = kvkern.new_workspace(q, kv, **options)
    counters = workspace[: 2 * 2 * 2 * 64]
    for config in (BASE, replace(BASE, launches=3)):
        workspace[counters.numel() :] = 255  # what other calls have left
        assert differing(attend(q, kv, config=config, workspace=workspace, **options), expected) == 0
        assert not counters.any()
    seen = []

    def failing(*arguments: object) -> None:
        seen.append(int(counters.view(torch.int32).sum()))
        raise RuntimeError("aborted")

    with monkeypatch.context() as patch:
        patch.setattr(exact, "softmax", failing)
        with pytest.raises(Exception, match="aborted"):
            attend(q, kv, workspace=workspace, **options)
    assert seen[-1] > 0, "the launch was aborted before anybody arrived: nothing was tested"
    assert not counters.any()
    assert differing(attend(q, kv, workspace=workspace, **options), expected) == 0


def same_as_c(q: torch.Tensor, kv: KVView, *, config: ExactConfig = BASE, **options) -> int:
    """Count the outputs that differ from the C reference."""
    return differing(attend(q, kv, config=config, **options), kvkern.prefix_attention(q, kv, backend="c", **options))


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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
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
def _count_pulls(ptrs, wanted, BYTES: tl.constexpr):
    tl.atomic_add(ptrs, 1 + BYTES, mask=wanted)


@pytest.mark.parametrize(("columns", "head_dim", "launches"), [(600, 64, 1), (300, 128, 3), (200, 16, 1)])
def test_pull__every_tile_once_and_nothing_else(monkeypatch, columns: int, head_dim: int, launches: int) -> None:
    """What programs ask the L2 for: here each request is counted in the words that it names."""
    q, k, v = random_qkv(2, 2, 2, 1, columns, head_dim)
    kv = shared_view(k, v, columns - 90, [1, 1], layers=2, layer=1, spare_tiles=1)
    views = [tensor.view(torch.int32) for tensor in (kv.pool, kv.suffix_k, kv.suffix_v)]
    before = [tensor.clone() for tensor in views]
    for module in (exact_score, exact_output):
        monkeypatch.setattr(module, "pull", _count_pulls)
    wide = replace(BASE, pull=True, launches=launches, score_rows=2, score_words=64, output_rows=2, output_lanes=64)
    wide = replace(wide, output_lanes=8) if head_dim == 16 else wide  # less than a warp
    attend(q, kv, config=wide)
    once = head_dim * 64 * 2 + 1
    pulled, *own = (after - old for after, old in zip(views, before, strict=True))
    shared_tiles, tiles = (columns - 90) // 64, (columns - 90) % 64
    # Both readers ask for the tiles that they share, of one layer's two heads, K and V; each asks for its own.
    assert pulled[pulled != 0].tolist() == [2 * once] * (shared_tiles * 2 * 2)
    for asked in own:
        first = asked[..., 0, 0]
        assert first.sum().item() == once * 2 * 2 * -(-(tiles + 90) // 64) == asked.sum().item()
        assert first.max().item() == once


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


def test_ops__declare_what_they_write() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    kv = KVView.from_dense(k, v)
    need = triton_door.scratch_bytes(q, kv.block_table, 4, kv.suffix_k, 1 << 30)
    arguments = (q, kv.pool, kv.block_table, kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len,
                 kv.suffix_k, kv.suffix_v, torch.empty(1, 1, 2, 64, dtype=torch.bfloat16), torch.empty(1, 2, 1),
                 torch.zeros(need, dtype=torch.uint8), 4, 4096, 0, 0.125, 0)  # fmt: skip
    torch.library.opcheck(ops.exact_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))
    appended = (k, v, kv.suffix_k, kv.suffix_v, int32(0), int32(20))
    torch.library.opcheck(ops.append.default, appended, test_utils=("test_schema", "test_faketensor"))


def off_by_two(tiles: torch.Tensor) -> torch.Tensor:
    """Copy tiles to an address that is a multiple of 4 bytes, but not of 16."""
    return torch.cat([tiles.new_zeros(2), tiles.flatten()])[2:].view(tiles.shape)


def test_raises_triton__arguments() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    kv = KVView.from_dense(k, v)
    odd = torch.zeros(1, 2, 1, 65, dtype=torch.bfloat16)[..., 1:]
    for bad_q, bad_kv, field in (
        (odd, kv, "q is at address"),
        (q.float(), kv, "q is"),
        (q, replace(kv, suffix_k=off_by_two(kv.suffix_k)), "suffix_k is at address"),
        (q, replace(kv, suffix_v=off_by_two(kv.suffix_v)), "suffix_v is at address"),
        (q, replace(kv, block_table=torch.full((1, 1, 2), 4)), "block_table is"),
        (torch.zeros(1, 2, 1, 24, dtype=torch.bfloat16), kv, "head_dim is 24"),
        (q, replace(kv, suffix_len=int32(65)), "suffix_k is"),
        (q, replace(kv, prefix_len=int32(64)), "prefix_len is"),
        (q, replace(kv, reader_prefix=int32(1)), "reader_prefix is"),
    ):
        with pytest.raises(kvkern.LayoutError, match=field):
            kvkern.prefix_attention(bad_q, bad_kv, backend="triton")
    with pytest.raises(kvkern.LayoutError, match="backend is 'cuda'"):
        kvkern.resolve(q, kv, backend="cuda")
    need = triton_door.scratch_bytes(q, kv.block_table, 4, kv.suffix_k, 0)
    with pytest.raises(kvkern.LayoutError, match=f"scratch is {need - 1} bytes"):
        _with_scratch(q, kv, need - 1)


def _with_scratch(q: torch.Tensor, kv: KVView, nbytes: int) -> None:
    ops.exact_attention(
        q, kv.pool, kv.block_table, kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len, kv.suffix_k,
        kv.suffix_v, torch.empty(1, 1, 2, 64, dtype=torch.bfloat16), None, torch.empty(nbytes, dtype=torch.uint8),
        4, 4096, 0, 0.125, 0,
    )  # fmt: skip


def test_raises_triton__work_space_of_other_shapes_with_the_same_bound() -> None:
    q, k, v = random_qkv(1, 1, 1, 16, 2100, 64)
    long, short = (KVView.from_dense(k[:, :, :n], v[:, :, :n], query_len=16) for n in (2100, 70))
    options = {"backend": "triton", "scratch_bound_bytes": 40_000}
    workspace = kvkern.new_workspace(q, long, **options)
    with pytest.raises(kvkern.LayoutError, match="workspace is"):
        kvkern.prefix_attention(q, short, workspace=workspace, **options)


def test_raises_triton__more_items_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, 1, 1, 1, 70, 64)
    monkeypatch.setattr(exact, "MOST_ITEMS", 1)
    with pytest.raises(kvkern.LayoutError, match="items of a KV head: too many readers"):
        kvkern.prefix_attention(q, KVView.from_dense(k, v), backend="triton")


def test_raises_triton__work_space_of_other_shapes() -> None:
    q, k, v = random_qkv(2, 2, 1, 1, 20, 64)
    kv, one = KVView.from_dense(k, v), KVView.from_dense(k[:1], v[:1])
    enough = kvkern.new_workspace(q, kv, backend="triton")
    for workspace in (enough[:-16], enough.view(torch.int16), enough.to("meta"),
                      kvkern.new_workspace(q[:1], one, backend="triton")):  # fmt: skip
        with pytest.raises(kvkern.LayoutError, match="workspace is"):
            kvkern.prefix_attention(q, kv, backend="triton", workspace=workspace)
    ours = kvkern.prefix_attention(q, kv, backend="triton", workspace=enough)
    assert differing(ours, kvkern.prefix_attention(q, kv, workspace=enough)) == 0, "C takes any and needs none"


def test_resolve__says_what_would_run() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    kv = KVView.from_dense(k, v)
    assert kvkern.resolve(q, kv).backend == "c"
    plan = kvkern.resolve(q, kv, backend="triton")
    assert (plan.backend, plan.launches) == ("triton", 1) and "interpreter" in plan.reason
    assert plan.workspace_bytes == kvkern.new_workspace(q, kv, backend="triton").numel() > 0
    assert kvkern.new_workspace(q, kv).numel() == 0 == kvkern.resolve(q, kv).workspace_bytes


def test_bits_triton__no_room_for_keys_and_an_odd_bound() -> None:
    """A view that lists no tile writes +0; any bound of the scratch is one."""
    q, k, v = random_qkv(1, 1, 1, 3, 70, 64)
    assert same_as_c(q, KVView.from_dense(k, v, query_len=3), scratch_bound_bytes=7425) == 0
    empty = KVView.from_dense(k[:, :, :0], v[:, :, :0], query_len=0)
    empty = replace(empty, suffix_k=empty.suffix_k[:, :, :0], suffix_v=empty.suffix_v[:, :, :0])
    assert differing(attend(q, empty), torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)) == 0
