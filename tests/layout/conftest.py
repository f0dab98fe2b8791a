"""Small documents for the layout tests: 2 layers, 3 KV heads, head_dim 64, seeded random KV."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvkern.spec
from kvkern.layout import BlockStore, Published
from kvkern.spec import KVSpec


@dataclass(frozen=True)
class Sample:
    """What a caller of `put` has."""

    spec: KVSpec
    ids: Tensor
    k: Tensor
    v: Tensor

    def put(self, store: BlockStore) -> Published:
        """Publish this document."""
        return store.put(self.spec, self.ids, self.k, self.v)

    def start(self, n: int) -> Sample:
        """Return the document of the first n tokens."""
        return replace(self, ids=self.ids[:n], k=self.k[:, :, :n], v=self.v[:, :, :n])


@pytest.fixture
def spec() -> KVSpec:
    """Return a small spec with a nested config."""
    return KVSpec(
        weights="0123456789abcdef" * 4,
        architecture="TinyForCausalLM",
        num_layers=2,
        num_q_heads=6,
        num_kv_heads=3,
        head_dim=64,
        config={"rms_norm_eps": 1e-06, "rope": {"rope_type": "default", "rope_theta": 10000.0}},
        producer_info={"attention": "eager"},
    )


@pytest.fixture
def make(spec: KVSpec) -> Callable[..., Sample]:
    """Return a function `(n, seed=0, **spec changes) -> Sample`; equal arguments, equal bits."""

    def build(n: int, seed: int = 0, **changes: Any) -> Sample:
        s, g = replace(spec, **changes), torch.Generator().manual_seed(seed)
        shape = (s.num_layers, s.num_kv_heads, n, s.head_dim)
        k, v = (torch.randn(shape, generator=g).bfloat16() for _ in range(2))
        return Sample(s, torch.randint(0, 50000, (n,), generator=g), k, v)

    return build


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    """Return an empty store."""
    return BlockStore(tmp_path / "store")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Return a function that runs code in a fresh interpreter and gives its stdout."""

    def run(code: str, *args: object, hash_seed: str = "random") -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        env["PYTHONPATH"] = str(Path(kvkern.spec.__file__).parents[1])
        command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def bits(tensor: Tensor) -> Tensor:
    """View bf16 as int16, the only honest comparison."""
    return tensor.contiguous().view(torch.int16)


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Return bit equality of two bf16 tensors."""
    return lambda a, b: a.shape == b.shape and torch.equal(bits(a), bits(b))
