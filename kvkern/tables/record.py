"""Record the table of SiLU from stock torch: `python -m kvkern.tables.record`, on a host that follows the contract."""

from __future__ import annotations

import hashlib

import torch

from kvkern.probe import stock_order
from kvkern.tables import _SILU_FILE


def record() -> bytes:
    """Return silu of every bf16 as stock computes it, 131,072 bytes."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    result = torch.nn.functional.silu(every)
    bits = result.view(torch.int16).clone()
    bits[result.isnan()] = 0x7FC0
    return bits.numpy().astype("<i2").tobytes()


if __name__ == "__main__":
    probe = stock_order()
    if not probe.follows:
        raise SystemExit(probe.reason)
    data = record()
    _SILU_FILE.write_bytes(data)
    print(hashlib.sha256(data).hexdigest())
