"""Record stock eager's outputs on a host that follows the contract: `python -m tests.kernels.golden.record DATE`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
import transformers
from safetensors.torch import save_file

from kvkern.contract import CONTRACT_ID
from kvkern.environment import cpu_isa
from tests.support.stock import PROBE, eager_attention
from tests.support.views import random_qkv

FILE = Path(__file__).with_name("stock.safetensors")
# (batch, group, kv_heads, query rows, columns, head_dim, spread of the scores)
CASES = (
    (2, 1, 2, 3, 16, 64, 6.0),
    (1, 3, 1, 2, 65, 64, 2.0),
    (1, 4, 1, 1, 513, 128, 0.5),
    (1, 8, 1, 4, 1024, 64, 1.0),
    (1, 4, 1, 3, 1025, 64, 0.5),
    (1, 4, 1, 1, 1100, 128, 0.5),
    (1, 3, 1, 5, 2100, 64, 0.3),
)


def main(date: str) -> None:
    """Write q, k, v and stock's out of every case, with the host that made them."""
    if not PROBE.follows:
        sys.exit(f"nothing recorded: {PROBE.reason}")
    tensors: dict[str, torch.Tensor] = {}
    for i, (*shape, spread) in enumerate(CASES):
        q, k, v = random_qkv(*shape, spread=spread, seed=i)
        if v.shape[2] > 1024:  # values that cancel, so that the outputs hang on where the runs end
            v *= 64
            v[:, :, 2::4] = -v[:, :, ::4][:, :, : v[:, :, 2::4].shape[2]]
        for name, tensor in {"q": q, "k": k, "v": v, "out": eager_attention(q, k, v)}.items():
            tensors[f"{i}.{name}"] = tensor.contiguous()
    host = {"contract": CONTRACT_ID, "date": date, "isa": cpu_isa(), "onednn": os.environ["ONEDNN_MAX_CPU_ISA"],
            "torch": str(torch.__version__), "transformers": transformers.__version__}  # fmt: skip
    save_file(tensors, FILE, metadata={"host": json.dumps(host, sort_keys=True)})


if __name__ == "__main__":
    main(sys.argv[1])
