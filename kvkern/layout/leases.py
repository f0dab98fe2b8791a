"""Leases: a reader says which documents it holds, in a file that only a living process keeps locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
import warnings
import weakref
from collections import Counter
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, LayoutError
from kvkern.layout.files import accessing, open_regular, read_regular
from kvkern.spec import is_digest

if TYPE_CHECKING:
    from pathlib import Path

    from kvkern.layout.directory import Directory

_LIMIT_BYTES = 1 << 26
_COMPACT_BYTES = 1 << 20
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class Holder:
    """What a lease lives as long as."""


class Leases:
    """What one process holds in one store: lines `+digest` and `-digest`, appended.

    The file is made at the first lease and goes when this object goes. A process that dies leaves its file unlocked,
    which is how gc tells it from a living one: nothing expires, nothing beats.
    """

    def __init__(self, directory: Directory) -> None:
        """Hold nothing yet."""
        self._directory = directory
        self._start_anew()
        _ALL.add(self)

    def hold(self, owner: object, digest: str) -> None:
        """Hold a document for as long as `owner` lives; without a writable store, go on without.

        A mapped block outlives even its deletion, so a reader without a lease reads on; what it misses is that gc
        leaves alone the blocks of a document that is removed while it is being opened.
        """
        try:
            with self._mutex:
                self._held[digest] += 1  # before the line: a finalizer that runs meanwhile must see it
                try:
                    if self._held[digest] == 1:
                        self._append(f"+{digest}\n")
                except BaseException:
                    self._forget(digest)
                    raise
        except LayoutError as error:
            if not isinstance(error, AccessError) or error.errno not in _READ_ONLY:
                warnings.warn(f"no lease on {digest}: {error}", stacklevel=3)
            return
        weakref.finalize(owner, self._release, digest, self._era).atexit = False

    def _release(self, digest: str, era: object) -> None:
        with self._mutex, contextlib.suppress(AccessError):
            if era is not self._era:  # held by the process that this one was forked from
                return
            self._forget(digest)
            if not self._held:
                self._rewrite("")
            elif digest not in self._held:
                self._append(f"-{digest}\n")
                if self._written_bytes > _COMPACT_BYTES:
                    # gc must not read it half. Never wait: this may be a finalizer inside of gc itself.
                    with self._directory.lock(exclusive=False, wait=False):
                        self._rewrite("".join(f"+{held}\n" for held in self._held))

    def _forget(self, digest: str) -> None:
        self._held[digest] -= 1
        if self._held[digest] <= 0:
            del self._held[digest]

    def _start_anew(self) -> None:
        self._mutex = threading.RLock()  # a finalizer may run while its own thread is in here
        self._era, self._fd, self._held, self._written_bytes = object(), -1, Counter[str](), 0

    def after_fork(self) -> None:
        """Let a forked child begin with nothing: what is held is its parent's."""
        if self._fd >= 0:
            os.close(self._fd)  # the parent's lock stays: it is the parent's own descriptor that keeps it
        self._start_anew()

    def _append(self, line: str) -> None:
        if self._fd < 0:
            self._fd = self._open()
        with accessing(self._directory.root / "leases", "write"):
            os.write(self._fd, line.encode())
        self._written_bytes += len(line)

    def _rewrite(self, text: str) -> None:
        with accessing(self._directory.root / "leases", "truncate"):
            os.ftruncate(self._fd, 0)
        self._written_bytes = 0
        if text:
            self._append(text)

    def _open(self) -> int:
        folder = self._directory.root / "leases"
        path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        with (
            self._directory.lock(exclusive=False),  # gc must not meet it unlocked
            accessing(path, "create"),
            self._directory.folder(folder, create=True) as parent,
        ):
            fd = os.open(path.name, flags, 0o666, dir_fd=parent)
            with contextlib.suppress(OSError):  # without locks gc refuses to run
                fcntl.flock(fd, fcntl.LOCK_EX)
        weakref.finalize(self, _drop, self._directory, fd, path, os.getpid())
        return fd


_ALL: weakref.WeakSet[Leases] = weakref.WeakSet()


def _after_fork() -> None:
    for leases in list(_ALL):
        leases.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def live_leases(directory: Directory, stale: list[Path]) -> Counter[str] | None:
    """Count the leases of living processes; the caller holds the store's lock alone.

    Args:
        directory: the store.
        stale: receives the files of processes that have ended.

    Returns:
        Digest to number of holders, or None when a living process's file cannot be read: then all is held.
    """
    total: Counter[str] = Counter()
    for name in directory.names("leases"):
        if not re.fullmatch(r"\d+-[0-9a-f]{16}", name):
            continue
        path = directory.root / "leases" / name
        try:
            if not _is_held(path):
                stale.append(path)
                continue
            total += held_in(read_regular(path, "a lease", _LIMIT_BYTES), path)
        except (FileNotFoundError, LayoutError) as error:
            if isinstance(error, FileNotFoundError):
                continue
            warnings.warn(f"{error}; until it is gone, nothing that was removed is collected", stacklevel=3)
            return None
    return total


def _is_held(path: Path) -> bool:
    fd, _ = open_regular(path, "a lease")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def held_in(data: bytes, path: Path) -> Counter[str]:
    """Count what a lease's lines hold.

    Raises:
        LayoutError: a line is none.
    """
    held: Counter[str] = Counter()
    for line in data.decode("ascii", "replace").split("\n")[:-1]:
        if line[:1] not in ("+", "-") or not is_digest(line[1:]):
            raise LayoutError(f"{path}: line {line[:80]!r}: a lease holds lines of + or - and a digest")
        held[line[1:]] += 1 if line[0] == "+" else -1
    return +held


def _drop(directory: Directory, fd: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has closed its own, and must not take its parent's lease away
        with contextlib.suppress(OSError, LayoutError):
            os.close(fd)
            directory.delete(path)
