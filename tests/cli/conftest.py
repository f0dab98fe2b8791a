"""Small stores of random KV, and two ways to run the command line: in this process, and in a fresh one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner, Result

import kvkern
from kvkern.cli import app
from kvkern.spec import KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = KVSpec("ab" * 32, "TinyForCausalLM", 2, 4, 2, 64, config={"rope": {"rope_theta": 10000.0}}, salt="mine")


@dataclass(frozen=True)
class SmallStore:
    """A store of one document of 300 tokens."""

    root: Path
    digest: str

    @property
    def blocks(self) -> list[Path]:
        """Return the shard files."""
        return sorted((self.root / "blocks").rglob("*.safetensors"))

    def damage(self) -> Path:
        """Flip one bit of the payload of one block; returns its path."""
        path = self.blocks[0]
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
        return path


@pytest.fixture
def small_store(tmp_path: Path) -> SmallStore:
    k, v = torch.randn(2, 2, 2, 300, 64).bfloat16()
    done = kvkern.Store(tmp_path / "store").put(SPEC, list(range(300)), k, v)
    return SmallStore(tmp_path / "store", done.digest)


@pytest.fixture
def kv() -> Callable[..., Result]:
    """Return a function that runs `kvkern ARGS` in this process."""
    return lambda *args, stdin=None: CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


@pytest.fixture
def fresh() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs code in a fresh interpreter, in which some packages cannot be imported."""

    def run(code: str, *args: object, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
        env = {**os.environ, "PYTHONPATH": str(Path(kvkern.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", block + code, *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    return run
