"""A file mapped read-only: it keeps no file descriptor, and an unreadable page is an error and no signal."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref

import numpy as np

_MADV_POPULATE_READ = 22  # Linux 5.14
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Pages:
    """Owns a mapping and lends it to numpy.

    Python's own mmap keeps a duplicate of the descriptor, so a few thousand blocks would use up a process's open
    files. The array is not marked read-only, because torch would warn at every tensor; a write still faults.
    """

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        weakref.finalize(self, _libc.munmap, address, size).atexit = False


def map_file(fd: int, size: int) -> np.ndarray:
    """Map a whole file, shared and read-only, and bring every page in, where the system can say that one is missing.

    Args:
        fd: the file; may be closed afterwards.
        size: its size in bytes, at least 1.

    Returns:
        `[size]` uint8 that keeps the mapping alive; never write it.

    Raises:
        OSError: the file cannot be mapped, or a page of it cannot be read.
    """
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        raise _last_error()
    pages = _Pages(address, size)
    if sys.platform == "linux" and _libc.madvise(address, size, _MADV_POPULATE_READ):
        error = _last_error()
        if error.errno == errno.EFAULT:  # touching the page would have raised SIGBUS
            raise OSError(errno.EIO, "a page cannot be read, or the file has become shorter")
        if error.errno != errno.EINVAL:  # an older kernel: pages come in when they are touched
            raise error
    return np.asarray(pages)


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
