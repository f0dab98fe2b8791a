"""Call the fast kernel in the interpreter, with a poisoned output, poisoned states and guard rows."""

from __future__ import annotations

import pytest
import torch

import kvkern
from kvkern.attention import new_workspace
from kvkern.kernels import fast_door
from kvkern.kernels.fast_plan import FastPlan
from kvkern.kernels.launch_config import FastConfig
from kvkern.view import KVView
from tests.support.views import random_qkv


def attend(
    q: torch.Tensor,
    kv: KVView,
    *,
    config: FastConfig | None = None,
    workspace: torch.Tensor | None = None,
    poison: float = float("nan"),
    **options,
):
    """Attend into a poisoned output between guard rows that must stay untouched; the counters must end at 0."""
    batch, heads, rows, head_dim = q.shape
    guarded = torch.full((batch + 2, rows, heads, head_dim), poison, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        if config is not None:
            patch.setattr(fast_door, "config_for", lambda device: config)
        made = take(q, kv)
        own = workspace is None
        workspace = new_workspace(q, kv, profile="fast") if own else workspace
        workspace[workspace.numel() - made.partial_bytes :].view(torch.float32).fill_(float("nan"))
        result = kvkern.prefix_attention(q, kv, out=guarded[1:-1], profile="fast", workspace=workspace, **options)
    guards = torch.full_like(guarded[0], poison).view(torch.int16)
    for guard in (guarded[0], guarded[-1]):
        assert torch.equal(guard.view(torch.int16), guards), "wrote outside of out"
    if own:
        assert not workspace[: workspace.numel() - made.partial_bytes].any(), "counters are not 0 after the launch"
    out = guarded[1:-1].clone()
    return (out, result[1]) if isinstance(result, tuple) else out


def take(q: torch.Tensor, kv: KVView) -> FastPlan:
    """Return the plan that a call takes."""
    return fast_door.plan_for(q, kv.block_table, kv.block_tiles, kv.suffix_k)


def readers_of_one_prefix(
    readers: int, columns: int, prefix_len: int, *, rows: int = 1, group: int = 3, head_dim: int = 64,
    kv_heads: int = 1, spread: float = 2.0, cancels: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Random q, k and v; the readers agree in their first keys.

    If it cancels, scores of the last head are flat and whole leaves cancel: its outputs hang on the order of the sums.
    """
    q, k, v = random_qkv(readers, group, kv_heads, rows, columns, head_dim, spread=spread)
    if cancels:
        q[:, group - 1 :: group] = 0.0
        for leaf, huge in ((3, 1.0), (4, -1.0), (6, 1.0), (8, -1.0)):
            v[:, :, 256 * leaf : 256 * (leaf + 1)] = huge * 2.0**20
    k[1:, :, :prefix_len], v[1:, :, :prefix_len] = k[:1, :, :prefix_len], v[:1, :, :prefix_len]
    return q, k, v
