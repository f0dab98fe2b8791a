"""Parallel: one piece of work per block, in threads where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WORTH_THREADS_BYTES = 2 << 20  # below, starting threads costs more than hashing

Progress = Callable[[int, int], None]
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], sizes: Sequence[int], progress: Progress | None
) -> list[_Result]:
    """Map `work` over items; the first error ends it.

    Args:
        work: called once per item; lets go of the GIL where it is slow.
        items: what to work on.
        sizes: bytes behind each item.
        progress: called with `(done, total)` bytes after each item.
    """
    total = sum(sizes)

    def collected(results: Iterable[_Result]) -> list[_Result]:
        found, done = [], 0
        for result, size in zip(results, sizes, strict=True):
            found.append(result)
            done += size
            if progress is not None:
                progress(done, total)
        return found

    if total < _WORTH_THREADS_BYTES:
        return collected(map(work, items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return collected(pool.map(work, items))
