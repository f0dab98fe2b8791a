"""glibc's malloc: keep it in the state that is kind to stock, or hand its free pages back on purpose.

A layer of stock eager allocates its repeated K and V anew. Left alone, malloc sometimes keeps those pages between two
layers and sometimes returns them, which makes a step three to five times slower: whole runs fall into either state.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20  # where malloc's own adjustment would end


def keep_freed_pages() -> bool:
    """Never return free memory to the system; blocks over 32 MiB are mapped on their own, as always.

    Returns:
        Whether the C library obeyed; one that is not glibc does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def return_freed_pages() -> None:
    """Return all free memory, so that the next allocations fault their pages in; nothing happens without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
