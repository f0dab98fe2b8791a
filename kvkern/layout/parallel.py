"""Parallel: one piece of work per block, in threads where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_WORTH_THREADS_BYTES = 2 << 20  # below, starting threads costs more than hashing

Progress = Callable[[int, int], None]
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], sizes: Sequence[int], progress: Progress | None
) -> Iterator[_Result]:
    """Map `work` over items, in their order; the first error ends it.

    Args:
        work: called once per item, begun in their order; lets go of the GIL where it is slow.
        items: what to work on.
        sizes: bytes behind each item.
        progress: called with `(done, total)` bytes after each item.

    Yields:
        The results.
    """
    if sum(sizes) < _WORTH_THREADS_BYTES:
        yield from _reported(map(work, items), sizes, progress)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from _reported(pool.map(work, items), sizes, progress)


def _reported(results: Iterable[_Result], sizes: Sequence[int], progress: Progress | None) -> Iterator[_Result]:
    done, total = 0, sum(sizes)
    for result, size in zip(results, sizes, strict=True):
        yield result
        done += size
        if progress is not None:
            progress(done, total)
