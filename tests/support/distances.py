"""How far bf16 outputs lie from the oracle's rounding, counted in steps between neighbouring bf16 numbers (ulp)."""

from __future__ import annotations

import torch

BINS = ("0", "1", "2", "3", "4", "5-8", "9-16", "17-")
_EDGES = torch.tensor([0, 1, 2, 3, 4, 8, 16])


def histogram(computed: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Count outputs by their distance.

    Args:
        computed: bf16.
        oracle: fp64 of the same shape.

    Returns:
        `[len(BINS)]` int64.
    """
    assert computed.dtype == torch.bfloat16 and oracle.dtype == torch.float64
    steps = (_ordered(computed) - _ordered(oracle.bfloat16())).abs()
    return torch.bucketize(steps.flatten(), _EDGES).bincount(minlength=len(BINS))


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """Return integers in the order of the numbers, neighbours one apart; both zeros are 0."""
    bits = x.contiguous().view(torch.int16).long()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
