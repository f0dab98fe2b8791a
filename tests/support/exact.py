"""Call the exact Triton kernels in the interpreter, with launch configurations that no bit may depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvkern
from kvkern.kernels import triton_door
from kvkern.kernels.exact_tickets import COUNTERS
from kvkern.kernels.launch_config import ExactConfig, exact_config
from kvkern.view import KVView
from tests.support.bits import differing
from tests.support.bounds import within
from tests.support.views import random_qkv

BASE = exact_config("interpreter")
# No bit may depend on any of these: programs of one row and of many, of one tile and of many, short and long trips, one
# program a row of the softmax and many.
CONFIGS = {
    "shipped": BASE,
    "narrow": replace(BASE, score_rows=1, output_rows=4, score_words=32, score_unroll=8, softmax_keys=128,
                      softmax_passes=1, softmax_steps=2, output_lanes=128, output_tiles=2, launches=3),
    "middle": replace(BASE, score_rows=3, output_rows=2, score_words=64, score_unroll=16, softmax_keys=256,
                      softmax_passes=2, softmax_steps=4, fold_runs=1, output_lanes=64, lag=2),
}  # fmt: skip


NOISE = 0xFF
"""Of every byte: NaN."""


def cancelling(batch: int, group: int, rows: int, columns: int, head_dim: int, kv_heads: int = 1, seed: int = 0):
    """Flat scores, and values of which many cancel: outputs hang on the order of the sums."""
    q, k, v = random_qkv(batch, group, kv_heads, rows, columns, head_dim, spread=0.5, seed=seed)
    v[:, :, 2::4] = -v[:, :, : columns - 2 : 4]
    k[1:, :, : columns - rows - 5] = k[:1, :, : columns - rows - 5]
    v[1:, :, : columns - rows - 5] = v[:1, :, : columns - rows - 5]
    return q, k, v


def attend(
    q: torch.Tensor, kv: KVView, *, config: ExactConfig = BASE, workspace: torch.Tensor | None = None, **options
) -> torch.Tensor:
    """Attend with Triton into a poisoned output between guard rows that must stay untouched; all accesses are checked.

    A work space that is not given is filled with noise.
    """
    options = {"backend": "triton", **options}
    batch, heads, rows, head_dim = q.shape
    guarded = torch.full((batch + 2, rows, heads, head_dim), float("nan"), dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_door, "config_for", lambda device: config)
        if workspace is None:
            bound = {name: value for name, value in options.items() if name in ("backend", "scratch_bound_bytes")}
            workspace = kvkern.new_workspace(q, kv, **bound)
            workspace[batch * heads * rows * 4 * COUNTERS.value :] = NOISE
        views = [value for value in vars(kv).values() if isinstance(value, torch.Tensor)]
        # What lies past the last key that a row sees may be anything.
        with np.errstate(invalid="ignore", over="ignore"), within(q, *views, workspace, guarded):
            kvkern.prefix_attention(q, kv, out=guarded[1:-1], workspace=workspace, **options)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all(), "wrote outside of out"
    return guarded[1:-1].clone()


def same_as_c(q: torch.Tensor, kv: KVView, *, config: ExactConfig = BASE, **options) -> int:
    """Count the outputs that differ from the C reference."""
    return differing(attend(q, kv, config=config, **options), kvkern.prefix_attention(q, kv, backend="c", **options))
