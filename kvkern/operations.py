"""Contract part B, the functional API: Linear, RMSNorm, RoPE, SiLU. The one place that decides which form runs."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from kvkern.contract import NORM_WIDTH_LIMIT, NORM_WIDTH_STEP
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import native, native_model
from kvkern.probe import stock_order
from kvkern.tables import silu_table

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.tables import RopeTable

Path = Literal["auto", "c", "torch", "triton"]

SCRATCH_BOUND_BYTES = 256 << 20
"""Scratch of a Linear in Triton, or what one row needs: more rows than fit go one slice after the other."""

FEW_ROWS = 4
"""Up to here C reads a weight at memory speed, in one pass; measured, stock is ahead from there on."""


SMALL = 4096
"""Up to so many products stock takes another matmul, with other bits."""


def resolve_linear(rows: int, weight: Tensor, *, path: Path = "auto") -> str:
    """Say which form of a Linear runs: `triton`, `c`, or `torch`, which is stock with a single row computed as two.

    Args:
        rows: rows of x.
        weight: `[out, in]` bf16.
        path: `auto`, or a form to insist on.

    Raises:
        LayoutError: no such path.
        UnsupportedError: the path does not run on the weight's device; or `torch` is asked for and stock adds in
            another order here, or takes another matmul for so few products.
    """
    if _takes_triton(weight, path, ("c", "torch")):
        return "triton"
    native.require_cpu(weight)
    is_small = max(rows, 2) * weight.numel() <= SMALL
    if path == "torch" and not stock_order().follows:
        raise UnsupportedError(f"path 'torch': {stock_order().reason}. Take path 'c'.")
    if path == "torch" and is_small:
        raise UnsupportedError(
            f"path 'torch': {rows} rows by a weight {tuple(weight.shape)} are {SMALL} products or fewer, which stock "
            "adds in another order. Take path 'c'."
        )
    if path != "auto":
        return path
    if not stock_order().follows or is_small or (rows <= FEW_ROWS and is_k_major(weight)):
        return "c"
    return "torch"


def linear(x: Tensor, weight: Tensor, *, path: Path = "auto") -> Tensor:
    """Compute `x @ weight.T` under the contract (B1).

    Args:
        x: `[..., in]` bf16.
        weight: `[out, in]` bf16; k-major (`to_k_major`) to be read at memory speed, else C copies it first.
        path: see `resolve_linear`.

    Returns:
        `[..., out]` bf16.

    Raises:
        LayoutError: shapes or dtypes do not fit.
        UnsupportedError: as `resolve_linear`.

    Bits:
        Each output depends on its row of x and its row of the weight alone: not on other rows, the path, threads,
        launches, or strides. Two limits, far from what a model computes: stock flushes subnormals in its products, so
        where a weight, or a product that matters, is under about 2^-100, `torch` may differ from `c`; and the same for
        the payload of a NaN.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or x.shape[-1:] != weight.shape[1:]:
        raise LayoutError(
            f"x and weight must be bfloat16 [..., in] and [out, in], got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    _require_one_device(x=x, weight=weight)
    shape = (*x.shape[:-1], weight.shape[0])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if rows.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(shape)
    form = resolve_linear(rows.shape[0], weight, path=path)
    if form == "triton":
        return _linear_triton(rows, weight).view(shape)
    rows = native.dense_rows(rows)  # stock takes another matmul for a transposed x
    if form == "torch":
        if rows.shape[0] == 1:  # stock adds one row in shorter runs
            return F.linear(rows.expand(2, -1), weight)[:1].view(shape)
        return F.linear(rows, weight).view(shape)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    native_model.linear(rows, to_k_major(weight), out)
    return out.view(shape)


def _linear_triton(rows: Tensor, weight: Tensor) -> Tensor:
    from kvkern.kernels import linear as linear_module
    from kvkern.kernels import model_ops

    out = rows.new_empty(rows.shape[0], weight.shape[0])
    if out.numel() == 0 or rows.shape[1] == 0:
        return out.zero_()
    if rows.shape[1] % 2 or rows.stride(1) != 1 or rows.stride(0) % 2 or rows.data_ptr() % 4:
        padded = rows.new_zeros(rows.shape[0], rows.shape[1] + rows.shape[1] % 2)
        padded[:, : rows.shape[1]] = rows
        rows = padded
    need = functools.partial(linear_module.scratch_floats, weight=weight, config=model_ops.config_for(rows.device))
    floats = max(need(1), min(need(rows.shape[0]), SCRATCH_BOUND_BYTES // 4))
    scratch = torch.empty(floats, dtype=torch.float32, device=rows.device)
    model_ops.linear(rows, weight if _is_in_words(weight) else _k_major_copy(weight), out, scratch)
    return out


def _is_in_words(weight: Tensor) -> bool:
    """Tell whether a weight can be read k-major in 32-bit words, two channels each, the last of them included."""
    outputs, inputs = weight.shape
    end = weight.storage_offset() + (inputs - 1) * weight.stride(1) + outputs + outputs % 2
    return (
        is_k_major(weight)
        and weight.stride(1) % 2 == 0
        and weight.data_ptr() % 4 == 0
        and 2 * end <= weight.untyped_storage().nbytes()
    )


def _k_major_copy(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    padded = weight.new_zeros(inputs, outputs + outputs % 2)  # an odd row would not begin on a word
    padded[:, :outputs] = weight.t()
    return padded[:, :outputs].t()


def is_k_major(weight: Tensor) -> bool:
    """Tell whether neighbouring output channels of a weight `[out, in]` are neighbours in memory."""
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0]


def to_k_major(weight: Tensor) -> Tensor:
    """Return the same weight `[out, in]`, k-major; a copy only where it is not so already."""
    return weight if is_k_major(weight) else _k_major_copy(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, path: Path = "auto") -> Tensor:
    """Compute RMSNorm over the last axis under the contract (B2).

    Args:
        x: `[..., width]` bf16, width a multiple of 32 under 8,192.
        weight: `[width]` bf16.
        eps: added to the mean of squares.
        path: `auto`, `c` or `triton`.

    Returns:
        The shape of x, bf16.

    Raises:
        LayoutError: shapes or dtypes do not fit, or the width is outside the contract.
        UnsupportedError: the path does not run on x's device.
    """
    width = x.shape[-1] if x.dim() else 0
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or tuple(weight.shape) != (width,):
        raise LayoutError(
            f"x and weight must be bfloat16 [..., width] and [width], got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    if width % NORM_WIDTH_STEP or not 0 < width < NORM_WIDTH_LIMIT:
        raise LayoutError(
            f"width is {width}; the contract has RMSNorm for multiples of {NORM_WIDTH_STEP} under {NORM_WIDTH_LIMIT}"
        )
    _require_one_device(x=x, weight=weight)
    rows = native.dense_rows(x.reshape(-1, width))
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if _takes_triton(x, path, ("c",)):
        from kvkern.kernels import model_ops

        model_ops.rms_norm(rows, weight.contiguous(), eps, out)
    else:
        native.require_cpu(x)
        native_model.rms_norm(rows, weight.contiguous(), eps, out)
    return out.view(x.shape)


def rotary(x: Tensor, positions: Tensor, table: RopeTable, *, path: Path = "auto") -> Tensor:
    """Rotate queries or keys under the contract (B3).

    Args:
        x: `[B, heads, T, head_dim]` bf16.
        positions: `[B, T]` int64, below the table's; in Triton any other gives NaN, because a check would wait for the
            GPU.
        table: the model's, on x's device.
        path: `auto`, `torch` or `triton`.

    Returns:
        The shape of x, bf16.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit.
        UnsupportedError: the path does not run on x's device.
    """
    half = table.cos.shape[1]
    fits = x.dim() == 4 and x.dtype == torch.bfloat16 and x.shape[3] == 2 * half
    if not fits or positions.dtype != torch.int64 or tuple(positions.shape) != (x.shape[0], x.shape[2]):
        raise LayoutError(
            f"x and positions must be bfloat16 [B, heads, T, {2 * half}] and int64 [B, T], got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(positions.shape)} {positions.dtype}"
        )
    _require_one_device(x=x, positions=positions, table=table.cos)
    if _takes_triton(x, path, ("torch",)):
        from kvkern.kernels import model_ops

        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        model_ops.rotary(native.dense_rows(x), positions, table.cos, table.sin, out)
        return out
    native.require_cpu(x)
    cos, sin = (part[positions].unsqueeze(1).repeat(1, 1, 1, 2) for part in (table.cos, table.sin))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def silu(x: Tensor, *, path: Path = "auto") -> Tensor:
    """Look SiLU up in the contract's table (B4).

    Args:
        x: any shape, bf16.
        path: `auto`, `c` or `triton`.
    """
    return _silu(x, None, path)


def silu_times(gate: Tensor, up: Tensor, *, path: Path = "auto") -> Tensor:
    """Compute `RNE16(silu(gate) * up)` under the contract (B4); bf16, both of one shape."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise LayoutError(
            f"gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} "
            f"{up.dtype}"
        )
    _require_one_device(gate=gate, up=up)
    return _silu(gate, up.contiguous(), path)


def _silu(gate: Tensor, up: Tensor | None, path: Path) -> Tensor:
    if gate.dtype != torch.bfloat16:
        raise LayoutError(f"x must be bfloat16, got {gate.dtype}")
    dense = gate.contiguous()
    out = torch.empty_like(dense)
    if _takes_triton(gate, path, ("c",)):
        from kvkern.kernels import model_ops

        model_ops.silu(dense, up, _table_on(gate.device), out)
    else:
        native.require_cpu(gate)
        native_model.silu(dense, up, silu_table(), out)
    return out


@functools.cache
def _table_on(device: torch.device) -> Tensor:
    return silu_table().to(device)


def _require_one_device(**tensors: Tensor) -> None:
    first, *others = tensors.values()
    if any(other.device != first.device for other in others):
        devices = {name: str(tensor.device) for name, tensor in tensors.items()}
        raise LayoutError(f"all arguments must be on one device, got {devices}")


def _takes_triton(x: Tensor, path: Path, others: tuple[str, ...]) -> bool:
    """Tell whether Triton runs: on a GPU always, on a CPU only where it is asked for.

    Raises:
        LayoutError: no such path; `others` are the ones beside `auto` and `triton`.
        UnsupportedError: Triton does not run there.
    """
    if path not in ("auto", "triton", *others):
        raise LayoutError(f"path is {path!r}; it must be one of {', '.join(('auto', 'triton', *others))}")
    if path in others or (path == "auto" and x.device.type == "cpu"):
        return False
    from kvkern.kernels import triton_door

    triton_door.require_available(x.device)
    return True
