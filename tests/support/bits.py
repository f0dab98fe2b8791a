"""Compare by bits: -0 is not +0, and a NaN equals itself."""

from __future__ import annotations

import hashlib

import torch


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Count elements whose bits differ."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    as_ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.contiguous().view(as_ints) != b.contiguous().view(as_ints)).sum())


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
