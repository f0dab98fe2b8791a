"""Time peers in rotation (A B C, A B C, ...), and play the times back into pytest-benchmark, one test per peer."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

READ = "read"
_SLOT_STEP = 2

_clock_s = 0.0


@dataclass(frozen=True)
class Variant:
    """One peer of a group.

    Attributes:
        name: the peer.
        run: what is timed; its argument says which buffer to use, to be taken modulo the buffers that there are.
        setup: runs before each round, outside the timing.
        info: goes into the JSON.
    """

    name: str
    run: Callable[[int], object]
    setup: Callable[[], object] | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What one peer took, in seconds per round, and what else is known of it."""

    group: str
    times_s: tuple[float, ...]
    info: dict[str, Any]


def rotate(group: str, variants: Sequence[Variant], *, rounds: int, warmup: int = 1) -> dict[str, Cell]:
    """Run all variants once per round, always in the same order, and time each run.

    Variants that share buffers never meet one that the variant before has just left in the cache: each
    takes another slot.

    Args:
        group: name of the table.
        variants: the peers; one that is called `READ` gives the bandwidth that the others are compared with.
        rounds: timed rounds.
        warmup: rounds before them.

    Returns:
        A cell for each variant's name.
    """
    print(f"{group}: {', '.join(v.name for v in variants)}: {rounds} rounds", end=" ", flush=True)
    runs: dict[str, list[tuple[float, int]]] = {variant.name: [] for variant in variants}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            for place, variant in enumerate(variants):
                run = _timed(variant, turn + warmup + _SLOT_STEP * place)
                if turn >= 0:
                    runs[variant.name].append(run)
    finally:
        gc.enable()
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)
    return _cells(group, variants, runs)


def replay(benchmark: BenchmarkFixture, cell: Cell) -> None:
    """Give pytest-benchmark the rounds of a cell: the target moves the clock (`REPLAYED`) by what was measured."""
    rounds = iter(cell.times_s)
    benchmark.group = cell.group
    benchmark.extra_info.update(cell.info)
    benchmark.pedantic(lambda: _advance(next(rounds)), rounds=len(cell.times_s))


def now() -> float:
    """Read the clock that `replay` moves."""
    return _clock_s


REPLAYED = pytest.mark.benchmark(timer=now)


def _advance(seconds: float) -> None:
    global _clock_s
    _clock_s += seconds


def _timed(variant: Variant, slot: int) -> tuple[float, int]:
    """Run once; return seconds, and how many pages the system had to give meanwhile."""
    if variant.setup is not None:
        variant.setup()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = variant.run(slot)
    elapsed_s = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del result
    return elapsed_s, faults


def _cells(group: str, variants: Sequence[Variant], runs: dict[str, list[tuple[float, int]]]) -> dict[str, Cell]:
    """Add to each variant's info its rates, by medians, and its page faults."""
    times = {name: tuple(seconds for seconds, _ in own) for name, own in runs.items()}
    gbps = {v.name: _gbps(v.info.get("bytes_moved"), times[v.name]) for v in variants}
    cells = {}
    for variant in variants:
        rate, read = gbps[variant.name], gbps.get(READ)
        info = {
            "variant": variant.name,
            **variant.info,
            "gbps": rate,
            "percent_of_read": 100 * rate / read if rate and read else None,
            "page_faults": int(statistics.median(faults for _, faults in runs[variant.name])),
        }
        cells[variant.name] = Cell(group, times[variant.name], info)
    return cells


def _gbps(bytes_moved: int | None, times_s: Sequence[float]) -> float | None:
    return None if bytes_moved is None else bytes_moved / statistics.median(times_s) / 1e9
