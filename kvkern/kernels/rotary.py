"""RoPE in Triton: contract B3, from a table; one program per head of one token.

    RNE16(RNE16(x cos) + RNE16(rot(x) sin)),  rot(x) = (-x[D/2:], x[:D/2])

Bits depend on a head's channels and its token's position alone. A position outside the table gives NaN everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvkern.kernels.primitives import round16, rounded_bits, widen16

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ModelConfig


@triton.jit
def rotary_kernel(
    x_ptr,  # [B, H, T, D] int16
    position_ptr,  # [B, T] int64
    cos_ptr,  # [positions, D / 2] int16
    sin_ptr,  # the same
    out_ptr,  # [B, H, T, D] int16
    stride_xb: tl.int64, stride_xh: tl.int64, stride_xt: tl.int64,
    stride_pb: tl.int64, stride_pt: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot: tl.int64,
    positions: tl.int64,
    HALF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one token."""
    token, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(position_ptr + b * stride_pb + token * stride_pt)
    is_known = (position >= 0) & (position < positions)
    lane = tl.arange(0, LANES)
    inside = lane < HALF
    angle = tl.where(is_known, position, 0) * HALF + lane
    cos = widen16(tl.load(cos_ptr + angle, mask=inside, other=0))
    sin = widen16(tl.load(sin_ptr + angle, mask=inside, other=0))
    x_ptrs = x_ptr + b * stride_xb + head * stride_xh + token * stride_xt + lane
    left = widen16(tl.load(x_ptrs, mask=inside, other=0))
    right = widen16(tl.load(x_ptrs + HALF, mask=inside, other=0))
    new_left = tl.where(lane * 0 + is_known > 0, _rotated(left, cos, -right, sin), 0x7FC0)
    new_right = tl.where(lane * 0 + is_known > 0, _rotated(right, cos, left, sin), 0x7FC0)
    out_ptrs = out_ptr + b * stride_ob + head * stride_oh + token * stride_ot + lane
    tl.store(out_ptrs, new_left.to(tl.int16), mask=inside)
    tl.store(out_ptrs + HALF, new_right.to(tl.int16), mask=inside)


@triton.jit
def _rotated(x, cos, other, sin):
    """Return the bits of RNE16(RNE16(x cos) + RNE16(other sin)), NaN as 0x7fc0."""
    first, second = x * cos, other * sin
    bits = rounded_bits(round16(first) + round16(second))
    return tl.where((first != first) | (second != second), 0x7FC0, bits)


def launch_rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, out: Tensor, config: ModelConfig) -> None:
    """Rotate `x [B, H, T, D]` into `out`, last axes dense.

    Args:
        x: bf16.
        positions: `[B, T]` int64.
        cos: `[positions, D / 2]` bf16, dense.
        sin: the same.
        out: `[B, H, T, D]` bf16, written; x itself is allowed.
        config: how to launch; no bit depends on it.
    """
    batch, heads, tokens, head_dim = x.shape
    rotary_kernel[(tokens, heads, batch)](
        x.view(torch.int16), positions, cos.view(torch.int16), sin.view(torch.int16), out.view(torch.int16),
        *x.stride()[:3], *positions.stride(), *out.stride()[:3], cos.shape[0],
        HALF=head_dim // 2, LANES=1 << (head_dim // 2 - 1).bit_length(),
        num_warps=config.rotary_warps, enable_fp_fusion=False,
    )  # fmt: skip
