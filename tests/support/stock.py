"""The oracle: Hugging Face's own eager attention, and whether it follows the contract on this host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from kvkern.probe import stock_order

PROBE = stock_order()
needs_stock_order = pytest.mark.skipif(not PROBE.follows, reason=PROBE.reason)


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None = None) -> torch.Tensor:
    """Stock eager, causal, the queries last: `[B, Hq, Tq, D]` and `[B, Hkv, T, D]` to `[B, Tq, Hq, D]`."""
    rows, columns = q.shape[2], k.shape[2]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    lowest = torch.full((rows, columns), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = lowest.triu(columns - rows + 1).expand(q.shape[0], 1, rows, columns)
    scaling = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return eager_attention_forward(module, q, k, v, mask, scaling)[0]


def in_parity_domain(q: torch.Tensor, k: torch.Tensor) -> bool:
    """CONTRACT.md, "Stock parity holds for"."""
    return k.shape[2] >= 16 and q.numel() * k.shape[2] > 4096
