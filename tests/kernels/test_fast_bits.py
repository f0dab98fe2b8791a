"""The fast kernel in the interpreter (its products widened to fp32): bits that company, order and split leave alone.

What is run here is the widened form; the form with bf16 tensor cores is compiled by the gate, and run by bench/gpu.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import kvkern
from kvkern.attention import launch, new_workspace
from kvkern.kernels import fast, fast_door, fast_finish, fast_state
from kvkern.kernels.launch_config import fast_config
from tests.support.bits import differing
from tests.support.fast import attend, readers_of_one_prefix, take
from tests.support.schedule import scheduled
from tests.support.views import int32, paged_view, random_qkv, shared_view

BASE = fast_config("interpreter")
UNITS = {unit: replace(BASE, units_d64=(unit,), units_d128=(unit,)) for unit in (256, 1024, 4096)}


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if isinstance(fast.fast_kernel, triton.JITFunction):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")


@pytest.mark.parametrize("readers", [2, 8])
def test_bits_readers__each_as_if_alone(readers: int) -> None:
    q, k, v = readers_of_one_prefix(readers, 330, 300, cancels=True)
    together = attend(q, shared_view(k, v, 300, [1] * readers))
    for b in (0, readers - 1):
        alone = attend(q[b : b + 1], shared_view(k[b : b + 1], v[b : b + 1], 300, [1]))
        assert differing(together[b : b + 1], alone) == 0


def test_bits_readers__any_order() -> None:
    q, k, v = readers_of_one_prefix(7, 290, 270, cancels=True)
    expected = attend(q, shared_view(k, v, 270, [1] * 7))
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 2, 5, 1, 4]):
        assert differing(attend(q[order], shared_view(k[order], v[order], 270, [1] * 7)), expected[order]) == 0


def test_bits_table__any_placement_of_blocks() -> None:
    q, k, v = readers_of_one_prefix(2, 700, 650, cancels=True)
    outs = [attend(q, shared_view(k, v, 650, [1, 1], seed=seed, layers=2, layer=seed % 2)) for seed in range(3)]
    assert [differing(out, outs[0]) for out in outs] == [0, 0, 0]


@pytest.mark.parametrize(
    ("columns", "prefix_len", "head_dim"),
    [(1500, 1300, 64), (4500, 4400, 64), (2200, 0, 64), (1400, 1100, 128)],
    ids=["P1300-S200-D64", "P4400-S100-D64", "P0-S2200-D64", "P1100-S300-D128"],
)
def test_bits_split__any_unit(columns: int, prefix_len: int, head_dim: int) -> None:
    q, k, v = readers_of_one_prefix(1, columns, prefix_len, head_dim=head_dim, group=2, cancels=True)
    kv = shared_view(k, v, prefix_len, [1])
    outs = [attend(q, kv, config=config) for config in UNITS.values()]
    assert [differing(out, outs[0]) for out in outs] == [0, 0, 0]


@pytest.mark.parametrize(("seed", "resident"), [(0, 2), (1, 1000)])
def test_bits_schedule__programs_at_once_in_any_order(seed: int, resident: int) -> None:
    """Whoever begins first and whoever arrives last: the same bits, and the counters at 0 (`attend`)."""
    q, k, v = readers_of_one_prefix(3, 700, 600, cancels=True)
    kv = shared_view(k, v, 600, [1, 1, 1])
    expected = attend(q, kv)
    with scheduled(seed, resident, chance=0.5) as schedule:
        assert differing(attend(q, kv), expected) == 0
    assert schedule.turns > 50


def test_bits_repeat__same_call_and_same_workspace() -> None:
    q, k, v = readers_of_one_prefix(2, 330, 300)
    kv = shared_view(k, v, 300, [1, 1])
    workspace = new_workspace(q, kv, profile="fast")
    outs = [attend(q, kv, workspace=workspace) for _ in range(3)]
    assert [differing(out, outs[0]) for out in outs] == [0, 0, 0]


def test_bits_lengths__one_workspace_and_grid_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph holds: grid, work space and scalars of one capacity serve every length below it."""
    q, k, v = readers_of_one_prefix(2, 560, 520)
    kv = shared_view(k, v, 520, [1, 1], spare_tiles=3)
    workspace, launched = new_workspace(q, kv, profile="fast"), []
    real = fast.fast_kernel.run

    def run(self: object, *args: object, grid: tuple[int, ...], **options: object) -> None:
        launched.append((grid, [x for x in args if not isinstance(x, torch.Tensor)]))
        real(*args, grid=grid, **options)

    monkeypatch.setattr(type(fast.fast_kernel), "run", run)
    for prefix_len, suffix in ((520, 40), (520, 17), (320, 220), (256, 9), (64, 1)):
        own = shared_view(k[:, :, : prefix_len + suffix], v[:, :, : prefix_len + suffix], prefix_len, [1, 1])
        suffix_k, suffix_v = kv.suffix_k.clone(), kv.suffix_v.clone()
        suffix_k[:, :, : own.suffix_k.shape[2]] = own.suffix_k
        suffix_v[:, :, : own.suffix_v.shape[2]] = own.suffix_v
        swapped = replace(
            kv, prefix_len=own.prefix_len, suffix_len=own.suffix_len, suffix_k=suffix_k, suffix_v=suffix_v
        )
        assert differing(attend(q, swapped, workspace=workspace), attend(q, own)) == 0, (prefix_len, suffix)
    captured = launched[::2]
    assert len(captured) == 5 and len({str(call) for call in captured}) == 1, "grid or scalars depend on a length"


def test_bits_graph__one_capture_serves_longer_suffixes_and_other_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph has the arguments of its capture: only what its tensors hold may change, and it is enough."""
    _, k, v = random_qkv(5, 3, 1, 1, 520, 64, seed=3)
    documents = [(k[i, :, :n], v[i, :, :n]) for i, n in enumerate((520, 130, 300))]
    in_pool = paged_view(documents, [0, 1], [(k[3 + b, :, :1], v[3 + b, :, :1]) for b in (0, 1)], [1, 1])
    q = torch.empty(2, 3, 1, 64, dtype=torch.bfloat16)
    tiles = torch.full((2, 1, 3, 64, 64), float("nan"), dtype=torch.bfloat16)
    kv = replace(in_pool, block_table=torch.zeros_like(in_pool.block_table[:2]), prefix_len=int32(0, 0),
                 reader_prefix=int32(0, 0), suffix_len=int32(0, 0), suffix_k=tiles, suffix_v=tiles.clone())  # fmt: skip
    out, workspace, launched = torch.empty(2, 1, 3, 64, dtype=torch.bfloat16), new_workspace(q, kv, profile="fast"), []
    real = fast.fast_kernel.run

    def run(self: object, *args: object, grid: tuple[int, ...], **options: object) -> None:
        launched.append((grid, [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args], str(options)))
        real(*args, grid=grid, **options)

    def replay() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(type(fast.fast_kernel), "run", run)
            launch(q, kv, out.fill_(float("nan")), None, profile="fast", workspace=workspace)
        return out

    for step, (attached, reader_prefix, lens) in enumerate((
        ((0, 1), (0, 1), (1, 64)),
        ((0, 1), (0, 1), (2, 65)),  # suffixes grow
        ((0, 1), (0, 0), (40, 66)),  # a reader takes another prefix
        ((2, 1), (0, 0), (3, 120)),  # another document in the first row
        ((2, 0), (1, 0), (90, 7)),
    )):  # fmt: skip
        own = [(k[3 + b, :, :n], v[3 + b, :, :n]) for b, n in enumerate(lens)]
        fresh = paged_view([documents[i] for i in attached], list(reader_prefix), own, [1, 1], seed=step)
        q.copy_(random_qkv(2, 3, 1, 1, 1, 64, spread=2.0, seed=step)[0])
        for mine, theirs in ((kv.suffix_k, fresh.suffix_k), (kv.suffix_v, fresh.suffix_v)):
            mine.fill_(float("nan"))[:, :, : theirs.shape[2]] = theirs
        for name in ("prefix_len", "reader_prefix", "suffix_len"):
            getattr(kv, name).copy_(getattr(fresh, name))
        expected = attend(q, fresh)
        if step == 3:
            assert differing(replay(), expected) > 0, "the twin: without the new document in the table"
        kv.block_table.copy_(in_pool.block_table[list(attached)])
        assert differing(replay(), expected) == 0, step
    assert len(launched) == 6 and len({str(call) for call in launched}) == 1, "a graph could not have replayed this"


def several_prefixes() -> tuple[torch.Tensor, list, list[int], list, list[int]]:
    """Five readers of four prefixes of which one has none, ragged in prefix, suffix and queries."""
    _, k, v = random_qkv(9, 3, 1, 1, 320, 64, spread=0.5, seed=9)
    prefixes = [(k[i, :, :n], v[i, :, :n]) for i, n in enumerate((300, 1, 130, 256))]
    suffixes = [(k[4 + b, :, :n], v[4 + b, :, :n]) for b, n in enumerate((9, 100, 3, 70, 33))]
    q = random_qkv(5, 3, 1, 5, 1, 64, spread=2.0, seed=11)[0]
    return q, prefixes, [1, 0, 1, 3, 0], suffixes, [5, 3, 1, 2, 0]


def test_bits_prefixes__each_reader_as_if_alone() -> None:
    q, prefixes, reader_prefix, suffixes, query_len = several_prefixes()
    together = attend(q, paged_view(prefixes, reader_prefix, suffixes, query_len, layers=2, layer=1, spare_tiles=1))
    for b, p in enumerate(reader_prefix):
        own = q.shape[2] - query_len[b]
        assert differing(together[b, :own], torch.zeros_like(together[b, :own])) == 0, "padding rows are +0"
        if query_len[b]:
            view = paged_view([prefixes[p]], [0], [suffixes[b]], [query_len[b]])
            assert differing(together[b : b + 1, own:], attend(q[b : b + 1, :, own:], view)) == 0


def test_bits_queries__a_chunk_as_its_rows_one_by_one() -> None:
    q, k, v = readers_of_one_prefix(1, 330, 300, rows=9)
    together = attend(q, shared_view(k, v, 300, [9]))
    for t in (0, 4, 8):
        end = 330 - 8 + t
        alone = attend(q[:, :, t : t + 1], shared_view(k[:, :, :end], v[:, :, :end], 300, [1]))
        assert differing(together[:, t : t + 1], alone) == 0


def test_bits_tail__prefix_lengths_of_one_tile_agree() -> None:
    """The extra cut lies at the last whole shared tile: where in that tile a prefix ends is no input."""
    q, k, v = readers_of_one_prefix(1, 330, 300)
    outs = [attend(q, shared_view(k, v, n, [1])) for n in (256, 257, 300, 319)]
    assert [differing(out, outs[0]) for out in outs] == [0] * 4
    assert differing(attend(q, shared_view(k, v, 128, [1])), outs[0]) > 0, "another cut may have other bits, and has"


# The twins: with a fault, the bits that the tests above compare do change.


def test_bits_split__a_flat_fold_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tree (leaves folded left to right) units do not agree."""
    q, k, v = readers_of_one_prefix(1, 2344, 2304, group=2, cancels=True)
    kv = shared_view(k, v, 2304, [1])
    right = [attend(q, kv, config=config) for config in UNITS.values()]
    assert [differing(out, right[0]) for out in right] == [0, 0, 0]
    monkeypatch.setattr(fast_finish, "fold_units", _flat_fold)
    wrong = [attend(q, kv, config=config) for config in UNITS.values()]
    assert differing(wrong[0], wrong[1]) > 0


@triton.jit
def _flat_fold(
    partial_ptr, row, stride_unit, count, first_unit, most, total_rows,
    UNIT_TILES: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    m_i, l_i, acc = fast_state.empty_state(ROWS, HEAD_DIM)
    for unit in range(0, most):
        state = fast_state.load_state(partial_ptr, unit * stride_unit, row, unit < count, total_rows, HEAD_DIM)
        m_i, l_i, acc = fast_state.fold(m_i, l_i, acc, state[0], state[1], state[2])
    return m_i, l_i, acc


def test_bits_twins__wrong_order_of_blocks_and_flipped_bits_show() -> None:
    q, k, v = readers_of_one_prefix(1, 1300, 1290, cancels=True)
    kv = shared_view(k, v, 1290, [1])
    expected = attend(q, kv)
    table = kv.block_table.clone()
    table[0, [2, 4]] = table[0, [4, 2]]
    assert differing(attend(q, replace(kv, block_table=table)), expected) > 0
    q, k, v = readers_of_one_prefix(1, 330, 300)
    expected = attend(q, shared_view(k, v, 300, [1]))
    for tensor in (k, v):
        flipped = tensor.clone()
        flipped.view(torch.int16)[0, 0, 77, 5] ^= 1 << 6
        other = shared_view(flipped if tensor is k else k, flipped if tensor is v else v, 300, [1])
        assert differing(attend(q, other), expected) > 0


def test_bits_twins__a_wrong_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = readers_of_one_prefix(2, 330, 300, rows=3)
    kv = shared_view(k, v, 300, [3, 3])
    expected = attend(q, kv)
    real = fast.visible_keys
    monkeypatch.setattr(fast, "visible_keys", lambda *a: real(*a) - 1)
    assert differing(attend(q, kv), expected) > 0


def test_counters__clean_after_an_aborted_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = readers_of_one_prefix(2, 330, 300)
    kv = shared_view(k, v, 300, [1, 1])
    workspace, expected = new_workspace(q, kv, profile="fast"), attend(q, kv)
    counters = workspace[: take(q, kv).counters * 4].view(torch.int32)
    seen = []
    real = fast.visible_keys

    def failing(*args: object) -> object:
        seen.append(int(counters.sum()))
        if len(seen) > 1:
            raise RuntimeError("aborted")
        return real(*args)

    monkeypatch.setattr(fast, "visible_keys", failing)
    with pytest.raises(Exception, match="aborted"):
        attend(q, kv, workspace=workspace)
    assert seen[-1] > 0, "the launch was aborted before anybody arrived: nothing was tested"
    assert not counters.any()
    monkeypatch.undo()
    assert differing(attend(q, kv, workspace=workspace), expected) == 0
    counters[0] = 1
    dirty = attend(q, kv, workspace=workspace, poison=7.0)
    assert differing(dirty, expected) > 0, "a dirty counter would have shown"


def test_launches__one_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = readers_of_one_prefix(2, 330, 300)
    kv = shared_view(k, v, 300, [1, 1])
    launched: list[str] = []
    runner = type(fast.fast_kernel)
    real = runner.run
    monkeypatch.setattr(runner, "run", lambda self, *a, **o: launched.append(self.fn.__name__) or real(self, *a, **o))
    workspace = new_workspace(q, kv, profile="fast")
    for _ in range(2):
        attend(q, kv, workspace=workspace)
    assert [name for name in launched if name.endswith("_kernel")] == ["fast_kernel"] * 2
    assert kvkern.resolve(q, kv, profile="fast").launches == fast_door.LAUNCHES == 1
