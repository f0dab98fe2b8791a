"""Contract part B, the functional API: Linear, RMSNorm, SiLU. The one place that decides which form of each runs."""

from __future__ import annotations

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

Path = Literal["auto", "c", "torch"]

FEW_ROWS = 4
"""Up to here C reads a weight at memory speed, in one pass; measured, stock is ahead from there on."""


def resolve_linear(rows: int, weight: Tensor, *, path: Path = "auto") -> str:
    """Say which form of a Linear runs: `c` or `torch`, which is stock with a single row computed as two.

    Args:
        rows: rows of x.
        weight: `[out, in]` bf16.
        path: `auto`, or a form to insist on.

    Raises:
        LayoutError: no such path.
        UnsupportedError: the weight is not on a CPU; or `torch` is asked for and stock adds in another order here.
    """
    native.require_cpu(weight)
    if path not in ("auto", "c", "torch"):
        raise LayoutError(f"path is {path!r}; it must be 'auto', 'c' or 'torch'")
    if path == "torch" and not stock_order().follows:
        raise UnsupportedError(f"path 'torch': {stock_order().reason}. Take path 'c'.")
    if path != "auto":
        return path
    if not stock_order().follows or (rows <= FEW_ROWS and is_k_major(weight)):
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
        Each output depends on its row of x and its row of the weight alone: not on other rows, the path, threads, or
        the weight's strides.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or x.shape[-1:] != weight.shape[1:]:
        raise LayoutError(
            f"x and weight must be bfloat16 [..., in] and [out, in], got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    rows = x.reshape(-1, x.shape[-1])
    if resolve_linear(rows.shape[0], weight, path=path) == "torch":
        if rows.shape[0] == 1:  # stock adds one row in shorter runs
            return F.linear(rows.expand(2, -1), weight)[:1].view(*x.shape[:-1], -1)
        return F.linear(x, weight)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    native_model.linear(native.dense_rows(rows), to_k_major(weight), out)
    return out.view(*x.shape[:-1], -1)


def is_k_major(weight: Tensor) -> bool:
    """Tell whether neighbouring output channels of a weight `[out, in]` are neighbours in memory."""
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0]


def to_k_major(weight: Tensor) -> Tensor:
    """Return the same weight `[out, in]`, k-major; a copy only where it is not so already."""
    return weight if is_k_major(weight) else weight.t().contiguous().t()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm over the last axis under the contract (B2).

    Args:
        x: `[..., width]` bf16, width a multiple of 32 under 8,192.
        weight: `[width]` bf16.
        eps: added to the mean of squares.

    Returns:
        The shape of x, bf16.

    Raises:
        LayoutError: shapes or dtypes do not fit, or the width is outside the contract.
    """
    width = x.shape[-1]
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or tuple(weight.shape) != (width,):
        raise LayoutError(
            f"x and weight must be bfloat16 [..., width] and [width], got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    if width % NORM_WIDTH_STEP or not 0 < width < NORM_WIDTH_LIMIT:
        raise LayoutError(
            f"width is {width}; the contract has RMSNorm for multiples of {NORM_WIDTH_STEP} under {NORM_WIDTH_LIMIT}"
        )
    native.require_cpu(x)
    rows = native.dense_rows(x.reshape(-1, width))
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    native_model.rms_norm(rows, weight.contiguous(), eps, out)
    return out.view(x.shape)


def silu(x: Tensor) -> Tensor:
    """Look SiLU up in the contract's table (B4).

    Args:
        x: any shape, bf16.
    """
    if x.dtype != torch.bfloat16:
        raise LayoutError(f"x must be bfloat16, got {x.dtype}")
    native.require_cpu(x)
    dense = x.contiguous()
    out = torch.empty_like(dense)
    native_model.silu(dense, None, silu_table(), out)
    return out
