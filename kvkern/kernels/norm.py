"""RMSNorm in Triton: contract B2, one program per row.

    y = RNE16(RNE16(x / sqrt(mean(x x) + eps)) weight)

The sum of squares runs over 4 x 8 lanes: each adds 16 squares in order, then their sum to what it has, and so on; then
the 4 groups are added in order, then the 8 lanes in order. Bits depend on the row, the weight and eps alone.
Lanes are taken out one by one with sums of which all terms but one are +0, so the order of the reduction is free.
Critical path: width / 32 dependent adds.
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

LANES = tl.constexpr(8)
GROUPS = tl.constexpr(4)
FLUSH = tl.constexpr(16)


@triton.jit
def norm_kernel(
    x_ptr,  # [rows, width] int16
    weight_ptr,  # [width] int16
    out_ptr,  # [rows, width] int16
    stride_x: tl.int64, stride_o: tl.int64,
    width, eps,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise one row, CHANNELS of it at a time once its sum is known."""
    x_row, out_row = x_ptr + tl.program_id(0) * stride_x, out_ptr + tl.program_id(0) * stride_o
    lane = tl.arange(0, LANES * GROUPS)
    total = tl.zeros([LANES * GROUPS], tl.float32)
    terms = _terms(x_row, lane, width)
    for start in range(FLUSH * LANES * GROUPS, width + FLUSH * LANES * GROUPS, FLUSH * LANES * GROUPS):
        upcoming = _terms(x_row, start + lane, width)  # on their way meanwhile
        part = tl.zeros([LANES * GROUPS], tl.float32)
        for i in tl.static_range(FLUSH):
            part = _add_square(part, terms[i])
        total = total + part
        terms = upcoming
    mean = tl.div_rn(_in_order(total), width.to(tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < width
        x = widen16(tl.load(x_row + channel, mask=inside, other=0))
        weight = widen16(tl.load(weight_ptr + channel, mask=inside, other=0))
        scaled = x * inverse
        bits = rounded_bits(round16(scaled) * weight)
        tl.store(out_row + channel, tl.where(scaled != scaled, 0x7FC0, bits).to(tl.int16), mask=inside)


@triton.jit
def _terms(x_row, channel, width):
    """Load FLUSH rows of lanes; +0 behind the end, whose square changes no sum of squares."""
    terms = ()
    for i in tl.static_range(FLUSH):
        place = channel + i * LANES * GROUPS
        terms = terms + (tl.load(x_row + place, mask=place < width, other=0),)
    return terms


@triton.jit
def _add_square(total, x):
    """Add the square of a bf16, rounded before it is added."""
    value = widen16(x)
    return total + value * value


@triton.jit
def _in_order(total):
    """Add the groups in order, then the lanes in order, beginning with +0."""
    groups = tl.reshape(total, (GROUPS, LANES))
    group = tl.arange(0, GROUPS)[:, None]
    lanes = tl.sum(tl.where(group == 0, groups, 0.0), axis=0)
    for i in tl.static_range(1, GROUPS):
        lanes = lanes + tl.sum(tl.where(group == i, groups, 0.0), axis=0)
    lane = tl.arange(0, LANES)
    result = 0.0
    for i in tl.static_range(LANES):
        result = result + tl.sum(tl.where(lane == i, lanes, 0.0), axis=0)
    return result


def launch_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, config: ModelConfig) -> None:
    """Compute RMSNorm over the last axis of `x [rows, width]` into `out`; innermost axes dense, all bf16."""
    rows, width = x.shape
    norm_kernel[(rows,)](
        x.view(torch.int16), weight.view(torch.int16), out.view(torch.int16), x.stride(0), out.stride(0), width, eps,
        CHANNELS=config.norm_lanes, num_warps=config.norm_warps, enable_fp_fusion=False,
    )  # fmt: skip
