"""Compare a peer with stock eager by bits, ahead of its timing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from kvkern.contract import CONTRACT_ID
from kvkern.probe import stock_order
from tests.support.bits import differing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def compared(pairs: Iterable[tuple[Tensor, Tensor]], *, claim: bool) -> dict[str, Any]:
    """Count outputs that differ from stock eager's.

    Args:
        pairs: (a peer's output, stock eager's) for each input.
        claim: the peer is said to have stock's bits: assert it, where stock adds in the contract's order.

    Returns:
        What a cell's `info` says of bits: outputs, how many differ, the digest, the contract or why there is no claim.
    """
    outputs = wrong = 0
    digest = hashlib.sha256()
    for ours, stock in pairs:
        wrong += differing(ours, stock)
        outputs += ours.numel()
        digest.update(ours.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    info = {"bits_differing": wrong, "bits_outputs": outputs, "output_sha256": digest.hexdigest()}
    if not claim:
        return info
    follows = stock_order().follows
    assert wrong == 0 or not follows, f"{wrong} of {outputs} outputs differ from stock eager"
    return info | {"contract": CONTRACT_ID} | ({} if follows else {"no_claim": stock_order().reason})
