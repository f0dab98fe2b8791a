"""Who does what in the exact launch, and when: tickets, waits, counters, and what programs ask the caches for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import kvkern
from kvkern.kernels import exact, exact_output, exact_rows, exact_score, exact_softmax, exact_tickets, triton_door
from kvkern.view import KVView
from tests.support.bits import differing
from tests.support.exact import BASE, CONFIGS, attend, same_as_c
from tests.support.interpreter import needs_interpreter
from tests.support.schedule import Hang, scheduled
from tests.support.views import random_qkv, shared_view

pytestmark = needs_interpreter
LONG = [pytest.mark.long, pytest.mark.slow]


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
    for module, name in ((exact_softmax, "wait_for"), (exact_output, "wait_for"), (exact_output, "await_count")):
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
def _row_kernel(place_ptr, key_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(place_ptr + i, exact_rows.place_of(i))
    tl.store(key_ptr + i, exact_rows.key_at(i))


def test_places__one_for_each_key_and_keys_16_apart_are_neighbours() -> None:
    places, keys = torch.empty(2, 256, dtype=torch.int32)
    _row_kernel[(1,)](places, keys, 256)
    assert torch.equal(keys[places], torch.arange(256, dtype=torch.int32))
    assert torch.equal(keys[1::2], keys[::2] + 16)
    assert torch.equal(keys[::2] % 32, torch.arange(16, dtype=torch.int32).repeat(8))


def test_bits_triton__p_is_read_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program reads of p before it waits is NaN here, and no output is; where nobody waits, all are."""
    q, k, v = random_qkv(1, 2, 1, 1, 700, 32)
    kv = shared_view(k, v, 600, [1])
    stock, has_waited = exact_output.load_rows, [False]

    def load(ptrs: tl.tensor, mask: tl.tensor | None, stride: int, count: int) -> tuple[tl.tensor, ...]:
        loaded = stock(ptrs, mask, stride, count)
        is_p = loaded[0].dtype == tl.int64
        return tuple(tl.full(one.shape, -1, tl.int64) for one in loaded) if is_p and not has_waited[0] else loaded

    def wait(is_there: bool):
        return lambda counter, count: has_waited.__setitem__(0, is_there)

    monkeypatch.setattr(exact_output, "load_rows", load)
    monkeypatch.setattr(exact_output, "await_count", wait(False))
    monkeypatch.setattr(exact_output, "wait_for", wait(True))
    for config in (BASE, CONFIGS["middle"]):
        assert same_as_c(q, kv, config=config) == 0
    monkeypatch.setattr(exact_output, "wait_for", wait(False))
    assert attend(q, kv).isnan().all()


@pytest.mark.parametrize("queries", [1, 3])
def test_warm__lines_of_q_and_p_and_nothing_else(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """Each program asks for the lines that it reads: of q, those of its rows; of p, those of its run."""
    asked: dict[object, list[int]] = {exact: [], exact_score: [], exact_output: []}

    def note(module: object):
        def warm(ptrs: tl.tensor, wanted: tl.tensor) -> None:
            asked[module] += ptrs.handle.data[wanted.handle.data].tolist()

        return warm

    for module in asked:
        monkeypatch.setattr(module, "warm", note(module))
    keys, heads = 600, 2
    q, k, v = random_qkv(1, heads, 1, queries, keys, 128)
    kv = KVView.from_dense(k, v, query_len=queries)
    config = replace(CONFIGS["middle"], warm=True, score_rows=1, output_rows=1, output_lanes=64)
    workspace = kvkern.new_workspace(q, kv, backend="triton")
    assert same_as_c(q, kv, config=config, workspace=workspace) == 0
    firsts = [value.data_ptr() for value in (kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len)]
    assert set(asked[exact]) == set(firsts), "there is no block, so no line of the table"
    lines_of_q = q.data_ptr() + 128 * torch.arange(heads * queries * 2)
    assert sorted(set(asked[exact_score])) == lines_of_q.tolist()
    layout = exact.scratch_layout(heads * queries, 128, kv.block_table.shape[1] * kv.block_tiles + 10, config)
    rows = workspace.data_ptr() + layout.e + 4 * layout.key_capacity * torch.arange(heads * queries)
    # A row that sees a key less still reads its line: neighbours in a program may see it.
    lines = (rows[:, None] + 128 * torch.arange(-(-keys // 32))).flatten()
    assert sorted(asked[exact_output]) == lines.tolist(), "one piece of the channels: every line once"


def crowded(seed: int, resident: int) -> int:
    """Let programs run by turns, in a work space of noise; returns the outputs that differ from C's."""
    q, k, v = random_qkv(2, 2, 2, 1, 400, 16)
    kv = shared_view(k, v, 300, [1, 1])
    config = replace(CONFIGS["middle"], softmax_passes=1, output_lanes=8, score_words=128, lag=1)
    workspace = kvkern.new_workspace(q, kv, backend="triton")
    counters = exact.scratch_layout(8, 16, 1, config).counter_bytes
    workspace[counters:] = torch.randint(0, 256, (workspace.numel() - counters,), dtype=torch.uint8)
    with scheduled(seed, resident) as schedule:
        out = attend(q, kv, config=config, workspace=workspace)
    assert schedule.turns > 100 and not workspace[:counters].any()
    return differing(out, kvkern.prefix_attention(q, kv, backend="c"))


ALL = 1000
SCHEDULES = [(0, 1), (1, 5), (2, ALL)]


@pytest.mark.parametrize(
    ("seed", "resident"),
    [*SCHEDULES, *(pytest.param(n, (2, 11, 30, ALL)[n % 4], marks=LONG) for n in range(3, 100))],
)
def test_bits_triton__programs_at_once_in_any_order(seed: int, resident: int) -> None:
    """However many have room, whoever begins first, wherever one is held up: C's bits, and nobody waits forever."""
    assert crowded(seed, resident) == 0


def _leave_early(counters_ptr: tl.tensor, programs: int, counters: tl.tensor) -> None:
    if exact_tickets.arrive(counters_ptr + exact_tickets.GONE) == programs - 2:
        words = counters_ptr + tl.arange(0, 16)
        for start in range(0, int(counters.handle.data.item()), 16):
            tl.store(words + start, 0)


def _waits_for(more: int):
    return lambda counter, count: exact_tickets.wait_for(counter, count + more)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        pytest.param(exact_softmax, "wait_for", _waits_for(-1), id="one score program is not waited for"),
        pytest.param(exact_output, "wait_for", _waits_for(-1), id="one row of p is not waited for"),
        pytest.param(exact, "leave", _leave_early, id="counters are cleared before the last has gone"),
    ],
)
def test_bits_triton__a_wait_that_is_too_short_fails(monkeypatch: pytest.MonkeyPatch, module, name: str, fault) -> None:
    monkeypatch.setattr(module, name, fault)
    assert any(_goes_wrong(seed) for seed in range(5))


def _goes_wrong(seed: int) -> bool:
    try:
        return crowded(seed, ALL) > 0
    except AssertionError:  # counters are not 0
        return True


def test_triton__a_wait_for_who_never_comes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_output, "wait_for", _waits_for(1))
    with pytest.raises(Hang):
        crowded(0, ALL)
