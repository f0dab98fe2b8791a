"""The contract's tables, read and never recomputed: SiLU (B4), shipped here, and the angles of RoPE (B3)."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvkern.contract import SILU_TABLE_SHA256
from kvkern.errors import IntegrityError, LayoutError

_SILU_FILE = Path(__file__).parent / "silu_bf16.bin"


@functools.cache
def silu_table() -> Tensor:
    """Return silu(x) of every bf16 x, `[65536]` bf16, by the bits of x.

    Raises:
        IntegrityError: the installed file is damaged.
    """
    data = _SILU_FILE.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SILU_TABLE_SHA256:
        raise IntegrityError(
            f"{_SILU_FILE}: SHA-256: the bytes have {found}, the contract says {SILU_TABLE_SHA256}: reinstall kvkern"
        )
    return _bf16(data)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """The rotations of every position, attention scaling included.

    Attributes:
        cos: `[positions, head_dim / 2]` bf16, dense.
        sin: the same.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_bytes(cls, data: bytes, head_dim: int) -> RopeTable:
        """Read a table: cos, then sin, each `[positions, head_dim / 2]` bf16 little-endian.

        Raises:
            LayoutError: the size is not that of whole positions.
        """
        if not data or len(data) % (2 * head_dim):
            raise LayoutError(f"a RoPE table of {len(data)} bytes holds no whole positions of head_dim {head_dim}")
        cos, sin = _bf16(data).view(2, -1, head_dim // 2)
        return cls(cos, sin)

    def to_bytes(self) -> bytes:
        """Return the bytes that the digest is taken over."""
        return b"".join(
            part.contiguous().view(torch.int16).numpy().astype("<i2").tobytes() for part in (self.cos, self.sin)
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _bf16(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16)
