"""What the exact Triton kernels refuse before any launch, what they declare, and what `resolve` says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvkern
from kvkern.kernels import exact, ops, triton_door
from kvkern.view import KVView
from tests.support.bits import differing
from tests.support.interpreter import needs_interpreter
from tests.support.views import int32, random_qkv

pytestmark = needs_interpreter


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
