"""The door to csrc_ref for everything but attention: Linear, RMSNorm, SiLU (contract part B) on plain CPU tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvkern.kernels.native import library

_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class LinearCall(ctypes.Structure):
    """Mirror of `kv_linear_call` in csrc_ref/kvkern.h, which documents every field."""

    _fields_ = [
        *((name, _int64) for name in ("rows", "inputs", "outputs")),
        ("x", _pointer),
        ("stride_x", _int64),
        ("weight", _pointer),
        ("stride_w", _int64),
        ("y", _pointer),
        ("stride_y", _int64),
        ("num_threads", _int64),
    ]


def linear(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Compute `y = x @ weight.T` under B1.

    Args:
        x: `[rows, in]` bf16, innermost axis dense.
        weight: `[out, in]` bf16, k-major: `weight.t()` has a dense innermost axis.
        y: `[rows, out]` bf16, innermost axis dense, written.
    """
    if y.numel() == 0 or x.shape[1] == 0:
        y.zero_()
        return
    call = LinearCall(
        x.shape[0], x.shape[1], weight.shape[0], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(1),
        y.data_ptr(), y.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if library().kv_linear(ctypes.byref(call)):
        raise MemoryError(f"no memory for the scratch of a Linear of {x.shape[0]} rows by {tuple(weight.shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None:
    """Compute RMSNorm under B2 over the last axis of `x [rows, width]`, into `y` of the same shape."""
    library().kv_rms_norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), eps, y.data_ptr(), y.stride(0), x.shape[0], x.shape[1]
    )


def silu(gate: Tensor, up: Tensor | None, table: Tensor, y: Tensor) -> None:
    """Compute `silu(gate) * up` under B4 elementwise, or `silu(gate)` without up; all dense, `table [65536]` int16."""
    library().kv_silu(
        gate.data_ptr(), None if up is None else up.data_ptr(), table.data_ptr(), y.data_ptr(), gate.numel()
    )
