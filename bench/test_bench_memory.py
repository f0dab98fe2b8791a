"""Memory of eight readers of one document; the time of the row is that of the whole child process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.documents import published
from bench.rotation import REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import PREFIX_TOKENS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = REPLAYED
WAYS = ("kvkern", "eager")


@pytest.mark.parametrize("variant", WAYS)
def test_memory(benchmark: BenchmarkFixture, variant: str) -> None:
    replay(benchmark, memory()[variant])


@functools.cache
def memory() -> dict[str, Cell]:
    """Run one process for each way of holding the document."""
    _, store, digest = published(PREFIX_TOKENS)
    found: dict[str, dict] = {}

    def measure(way: str) -> None:
        command = [sys.executable, "-m", "bench.memory_child", way, str(store.blocks.root), digest]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout.splitlines()[-1])

    variants = [Variant(way, lambda _, way=way: measure(way)) for way in WAYS]
    cells = rotate("memory", variants, rounds=1, warmup=0)
    for way in WAYS:
        cells[way].info.update(found[way])
    return cells
