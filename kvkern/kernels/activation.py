"""SiLU in Triton: contract B4, a gather from the table, and its product with `up`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvkern.kernels.primitives import rounded_bits, widen16

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ModelConfig


@triton.jit
def silu_kernel(
    gate_ptr,  # [count] int16
    up_ptr,  # [count] int16
    table_ptr,  # [65536] int16, by the bits of the argument
    out_ptr,  # [count] int16
    count: tl.int64,
    HAS_UP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute RNE16(silu(gate) up), or silu(gate), of LANES elements."""
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = place < count
    bits = tl.load(gate_ptr + place, mask=inside, other=0)
    activated = tl.load(table_ptr + (bits.to(tl.int32) & 0xFFFF), mask=inside, other=0)
    if HAS_UP:
        up = tl.load(up_ptr + place, mask=inside, other=0)
        activated = rounded_bits(widen16(activated) * widen16(up)).to(tl.int16)
    tl.store(out_ptr + place, activated, mask=inside)


def launch_silu(gate: Tensor, up: Tensor | None, table: Tensor, out: Tensor, config: ModelConfig) -> None:
    """Compute `out = RNE16(silu(gate) * up)`, or `silu(gate)` without up; dense bf16 of one shape, `table [65536]`."""
    if gate.numel() == 0:
        return
    words = [tensor.view(torch.int16) for tensor in (gate, gate if up is None else up, table, out)]
    silu_kernel[(-(-gate.numel() // config.activation_lanes),)](
        *words, gate.numel(), HAS_UP=up is not None, LANES=config.activation_lanes,
        num_warps=config.activation_warps, enable_fp_fusion=False,
    )  # fmt: skip
