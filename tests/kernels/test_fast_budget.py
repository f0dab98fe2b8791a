"""The fast kernel in the interpreter against fp64: at most twice the error of plain bf16 torch; and what is refused.

q, K and V are bf16: no other dtype is stored or read. The interpreter multiplies them as fp32, see kernels/fast.py; an
fp16 form of the kernel does not exist, so none is tested.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton

import kvkern
from kvkern.attention import new_workspace
from kvkern.kernels import fast, fast_door, ops, triton_door
from kvkern.view import KVView
from tests.support.bits import differing
from tests.support.fast import attend, readers_of_one_prefix
from tests.support.fast_twin import TWINS, twin
from tests.support.views import int32, paged_view, random_qkv, shared_view


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if isinstance(fast.fast_kernel, triton.JITFunction):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in torch's own operations and in the dtype given: `[B, Hq, Tq, D]` to `[B, Tq, Hq, D]`."""
    group, rows, columns = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def within_budget(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    oracle = plain(q.double(), k.double(), v.double())
    allowed, found = (plain(q, k, v).double() - oracle).abs(), (out.double() - oracle).abs()
    assert found.max() <= 2 * allowed.max(), (found.max(), allowed.max())
    assert found.square().mean() <= 4 * allowed.square().mean()


SHAPES = [  # readers, group, kv_heads, head_dim, rows, columns, prefix
    pytest.param(1, 4, 2, 128, 1, 330, 300, id="B1-Q8-KV2-D128-P300"),
    pytest.param(3, 3, 1, 64, 1, 270, 257, id="B3-Q3-KV1-D64-P257"),
    pytest.param(2, 1, 1, 64, 1, 70, 64, id="B2-Q1-KV1-D64-P64"),
    pytest.param(1, 8, 1, 128, 3, 130, 63, id="B1-Q8-KV1-D128-Tq3-P63"),
    pytest.param(2, 3, 1, 64, 5, 300, 1, id="B2-Q3-KV1-D64-Tq5-P1"),
    pytest.param(2, 2, 1, 64, 2, 20, 0, id="B2-Q2-KV1-D64-Tq2-P0"),
    pytest.param(1, 5, 1, 64, 9, 200, 190, id="B1-Q5-KV1-D64-Tq9-P190"),
    pytest.param(1, 2, 1, 64, 1, 1, 0, id="B1-Q2-KV1-D64-T1"),
    pytest.param(1, 3, 1, 64, 1, 256, 255, id="B1-Q3-KV1-D64-P255-S1"),
    pytest.param(1, 3, 1, 64, 2, 321, 256, id="B1-Q3-KV1-D64-Tq2-P256-S65"),
    pytest.param(2, 3, 2, 64, 1, 577, 512, id="B2-Q6-KV2-D64-P512-S65"),
    pytest.param(1, 3, 1, 128, 1, 128, 65, id="B1-Q3-KV1-D128-P65-S63"),
    pytest.param(1, 2, 1, 64, 1, 256, 256, id="B1-Q2-KV1-D64-P256-no-suffix"),
    pytest.param(1, 2, 1, 64, 1, 300, 300, id="B1-Q2-KV1-D64-P300-no-suffix"),
]


@pytest.mark.parametrize(("readers", "group", "kv_heads", "head_dim", "rows", "columns", "prefix_len"), SHAPES)
def test_budget_fast__shapes(readers, group, kv_heads, head_dim, rows, columns, prefix_len) -> None:
    q, k, v = readers_of_one_prefix(
        readers, columns, prefix_len, rows=rows, group=group, kv_heads=kv_heads, head_dim=head_dim
    )
    kv = shared_view(k, v, prefix_len, [rows] * readers, layers=3, layer=1, spare_tiles=1)
    within_budget(attend(q, kv), q, k, v)


def test_budget_fast__ragged_readers_of_several_prefixes() -> None:
    _, k, v = random_qkv(7, 3, 1, 1, 320, 64, seed=9)
    prefixes = [(k[i, :, :n], v[i, :, :n]) for i, n in enumerate((300, 1, 130))]
    suffixes = [(k[3 + b, :, :n], v[3 + b, :, :n]) for b, n in enumerate((9, 100, 3, 70))]
    reader_prefix, query_len = [1, 0, 1, 2], [5, 3, 1, 2]
    q = random_qkv(4, 3, 1, 5, 1, 64, spread=2.0, seed=11)[0]
    out = attend(q, paged_view(prefixes, reader_prefix, suffixes, query_len, layers=2, spare_tiles=1))
    for b, p in enumerate(reader_prefix):
        own = 5 - query_len[b]
        keys, values = (torch.cat([x, y], dim=1)[None] for x, y in zip(prefixes[p], suffixes[b], strict=True))
        within_budget(out[b : b + 1, own:], q[b : b + 1, :, own:], keys, values)
        assert differing(out[b, :own], torch.zeros_like(out[b, :own])) == 0


def test_budget_fast__a_row_that_misses_a_tile_fails() -> None:
    """The twin: the budget is small enough to notice the loss of 30 of 330 keys."""
    q, k, v = readers_of_one_prefix(1, 330, 300)
    short = attend(q, shared_view(k[:, :, :300], v[:, :, :300], 300, [1]))
    with pytest.raises(AssertionError):
        within_budget(short, q, k, v)


def test_budget_lse__natural_log() -> None:
    q, k, v = random_qkv(2, 3, 1, 3, 300, 64, spread=2.0)
    kv = replace(KVView.from_dense(k, v, query_len=3), query_len=int32(3, 1))
    lse = attend(q, kv, return_lse=True)[1]
    scores = q.double().unflatten(1, (1, 3)) @ k.double().mT[:, :, None] * 64**-0.5
    visible = torch.ones(3, 300, dtype=torch.bool).tril(297)
    oracle = scores.masked_fill(~visible, -math.inf).logsumexp(-1).flatten(1, 2)
    rounded = scores.bfloat16().float().masked_fill(~visible, -math.inf).logsumexp(-1).flatten(1, 2)
    assert (lse[1, :, :2] == -torch.inf).all() and (lse[0] > -torch.inf).all()
    oracle[1, :, :2] = rounded[1, :, :2] = lse[1, :, :2] = 0
    assert (lse - oracle).abs().max() <= 2 * (rounded - oracle).abs().max()


def test_bits_empty__no_reader_and_no_key() -> None:
    q, k, v = random_qkv(1, 4, 2, 2, 5, 64)
    assert kvkern.prefix_attention(q[:0], KVView.from_dense(k[:0], v[:0]), profile="fast").shape == (0, 2, 8, 64)
    out = attend(q, KVView.from_dense(k, v, lens=int32(0), query_len=int32(0)))
    assert differing(out, torch.zeros_like(out)) == 0


def test_ops__declare_what_they_write() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    kv = KVView.from_dense(k, v)
    arguments = (q, kv.pool, kv.block_table, kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len,
                 kv.suffix_k, kv.suffix_v, torch.empty(1, 1, 2, 64, dtype=torch.bfloat16), torch.empty(1, 2, 1),
                 new_workspace(q, kv, profile="fast"), 4, 4096, 0, 0.125)  # fmt: skip
    torch.library.opcheck(ops.fast_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [1, 3])
def test_twin__has_the_kernels_bits_but_for_the_order_of_sums(rows: int) -> None:
    """The twin that reads many documents in bench/pairs_many.py; with another leaf cut it is another arithmetic."""
    q, k, v = random_qkv(1, 3, 1, rows, 420, 64, spread=3.0)
    out = attend(q, shared_view(k, v, 330, [rows]))
    assert differing(out, twin(q, k, v, 330, TWINS["fast"])) <= 0.01 * out.numel()
    wrong = [twin(q, k, v, 200, TWINS["fast"]), twin(q, k, v, 330, TWINS["fast-scores"])]
    assert all(differing(out, other) > 0.02 * out.numel() for other in wrong)


def test_raises_fast__before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = readers_of_one_prefix(2, 300, 260, group=2)
    kv = shared_view(k, v, 260, [1, 1])
    enough = new_workspace(q, kv, profile="fast")
    of_one = new_workspace(q[:1], shared_view(k[:1], v[:1], 260, [1]), profile="fast")
    wide = random_qkv(2, 2, 1, 1, 300, 96)
    odd = torch.zeros(2, 2, 1, 68, dtype=torch.bfloat16)[..., 4:]
    monkeypatch.setattr(type(fast.fast_kernel), "run", lambda *a, **o: pytest.fail("launched"))
    for bad_q, bad_kv, workspace, error, said in (
        (q.float(), kv, enough, kvkern.LayoutError, "q is"),
        (wide[0], KVView.from_dense(*wide[1:]), enough, kvkern.UnsupportedError, "head_dim is 96"),
        (q, replace(kv, block_tiles=6), enough, kvkern.UnsupportedError, "block_tiles is 6"),
        (odd, kv, enough, kvkern.LayoutError, "q is at address"),
        (q, replace(kv, block_table=kv.block_table + 8), enough, kvkern.LayoutError, "block_table is"),
        (q, replace(kv, suffix_len=int32(400, 400)), enough, kvkern.LayoutError, "suffix_k is"),
        (q, kv, enough[:-16], kvkern.LayoutError, f"workspace is {enough.numel() - 16}"),
        (q, kv, of_one, kvkern.LayoutError, "workspace is"),
        (q[:1], shared_view(k[:1], v[:1], 260, [1]), enough, kvkern.LayoutError, "workspace is"),
        (q, kv, enough.view(torch.int16), kvkern.LayoutError, "workspace is"),
        (q, kv, enough.to("meta"), kvkern.LayoutError, "workspace is"),
    ):
        with pytest.raises(error, match=said):
            kvkern.prefix_attention(bad_q, bad_kv, profile="fast", workspace=workspace)
    with pytest.raises(kvkern.UnsupportedError, match="no backend 'c'"):
        kvkern.prefix_attention(q, kv, profile="fast", backend="c")
    with pytest.raises(kvkern.UnsupportedError, match="profile is 'quick'"):
        kvkern.resolve(q, kv, profile="quick")


def test_raises_fast__on_a_cpu_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_door, "is_interpreted", lambda: False)
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    for backend in ("auto", "triton"):
        with pytest.raises(kvkern.UnsupportedError, match="'fast' computes with a GPU's tensor cores"):
            kvkern.prefix_attention(q, KVView.from_dense(k, v), profile="fast", backend=backend)


def test_resolve__says_what_would_run() -> None:
    q, k, v = readers_of_one_prefix(4, 300, 200)
    kv = shared_view(k, v, 200, [1] * 4)
    plan = kvkern.resolve(q, kv, profile="fast")
    assert (plan.backend, plan.profile, plan.launches) == ("triton", "fast", 1)
    assert plan.bytes_moved == (200 + 4 * 100) * 2 * 64 * 2 + 2 * q.numel() * 2
    assert plan.workspace_bytes == new_workspace(q, kv, profile="fast").numel()
    assert fast_door.HEAD_DIMS == (64, 128)
