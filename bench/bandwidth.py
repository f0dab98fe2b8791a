"""How fast this machine reads memory: the yardstick that runs inside every rotation over large buffers."""

from __future__ import annotations

import functools
import statistics

import torch

from bench.rotation import READ, Cell, Variant, rotate
from bench.shapes import last_level_cache_bytes

FORMS = ("float32", "float64", "int64")


def forms() -> tuple[str, ...]:
    """Names of the ways to read: a sum over each dtype with all threads, and with one."""
    return tuple(f"{form}-{threads}" for threads in ("all", "one") for form in FORMS)


@functools.cache
def bandwidth() -> dict[str, Cell]:
    """Sum a buffer of 8 times the last-level cache, at least 256 MiB."""
    return rotate("bandwidth", [_reader(name, name) for name in forms()], rounds=15)


def read_variant() -> Variant:
    """Return the fastest of the ways that use all threads, for the rotation of other peers."""
    cells = bandwidth()
    return _reader(READ, min(forms()[: len(FORMS)], key=lambda name: statistics.median(cells[name].times_s)))


def _reader(name: str, form: str) -> Variant:
    dtype, threads = form.split("-")
    buffer = _buffer().view(getattr(torch, dtype))
    count = torch.get_num_threads() if threads == "all" else 1
    return Variant(name, lambda _: _sum(buffer, count), info={"bytes_moved": buffer.nbytes, "threads": count})


def _sum(buffer: torch.Tensor, threads: int) -> torch.Tensor:
    before = torch.get_num_threads()
    if threads == before:
        return buffer.sum()
    torch.set_num_threads(threads)
    try:
        return buffer.sum()
    finally:
        torch.set_num_threads(before)


@functools.cache
def _buffer() -> torch.Tensor:
    """Random numbers from 1 to 2: normal numbers under every dtype."""
    return torch.rand(max(256 << 20, 8 * last_level_cache_bytes()) // 4) + 1
