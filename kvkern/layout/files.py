"""Files that appear whole or not at all, that outlive a power cut, and that are read with every surprise named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvkern.errors import AccessError, IntegrityError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPORARY = ".tmp-"
"""How the name of an unfinished file begins."""

_STEP_BYTES = 1 << 20
_DAY_S = 86400.0
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class OversizedFile(LayoutError):
    """A regular file is longer than any of its kind may be; it has not been read."""


class DamagedFile(IntegrityError):
    """A regular file was read whole or is too long, which proves that its bytes are not those that its name promises.

    Attributes:
        path: the name under which it was read.
        digest: the SHA-256 that its name promises, 64 hex digits.
        limit_bytes: a file that is longer cannot have that digest and be valid: it needs no reading.
    """

    def __init__(self, message: str, path: Path, digest: str, limit_bytes: int) -> None:
        super().__init__(message)
        self.path, self.digest, self.limit_bytes = path, digest, limit_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.path, self.digest, self.limit_bytes)


@contextmanager
def accessing(path: Path, operation: str) -> Iterator[None]:
    """Turn what the file system refuses inside into an AccessError that names the file.

    Raises:
        AccessError: the file system refused.
    """
    try:
        yield
    except AccessError:
        raise
    except OSError as error:
        raise AccessError(path, operation, error) from None


def open_regular(path: Path, what: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading, never a link, and never waiting for one.

    Args:
        path: the file.
        what: what it should be, for the message.

    Returns:
        A file descriptor, to be closed by the caller, and the file's status.

    Raises:
        FileNotFoundError: there is none.
        LayoutError: it is no regular file.
        AccessError: the file system refused.
    """
    try:
        # O_NONBLOCK: a FIFO in the place of a file must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise LayoutError(f"{path}: file type: {what} must be a regular file, not a link") from None
        raise AccessError(path, "open", error) from None
    try:
        with accessing(path, "stat"):
            info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise LayoutError(f"{path}: file type: {what} must be a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info


def read_regular(path: Path, what: str, limit_bytes: int) -> bytes:
    """Read a small regular file whole.

    Raises:
        FileNotFoundError: there is none.
        LayoutError: it is no regular file, or (OversizedFile) longer than `limit_bytes`.
        AccessError: the file system refused.
    """
    fd, info = open_regular(path, what)
    try:
        parts, size = [], 0
        with accessing(path, "read"):
            while max(info.st_size, size) <= limit_bytes and (part := os.read(fd, limit_bytes + 1 - size)):
                parts.append(part)
                size += len(part)
    finally:
        os.close(fd)
    size = max(info.st_size, size)
    if size > limit_bytes:
        raise OversizedFile(f"{path}: size: {size} bytes are over the limit of {limit_bytes}")
    return b"".join(parts)


def has_digest(fd: int, digest: str, limit_bytes: int) -> bool:
    """Tell whether an open file holds at most `limit_bytes` bytes with this SHA-256; a longer one is not read."""
    sha256, place = hashlib.sha256(), 0
    if os.fstat(fd).st_size > limit_bytes:
        return False
    while place <= limit_bytes and (part := os.pread(fd, _STEP_BYTES, place)):
        sha256.update(part)
        place += len(part)
    return place <= limit_bytes and sha256.hexdigest() == digest


def holds(path: Path, what: str, data: bytes) -> bool:
    """Tell whether a regular file holds exactly these bytes.

    Raises:
        FileNotFoundError, LayoutError, AccessError: as `open_regular`.
    """
    fd, info = open_regular(path, what)
    try:
        place, view = 0, memoryview(data)
        with accessing(path, "read"):
            while info.st_size == len(data) and (part := os.read(fd, _STEP_BYTES)):
                if view[place : place + len(part)] != part:
                    break
                place += len(part)
        return place == len(data) == info.st_size
    finally:
        os.close(fd)


def write_atomically(folder: int, name: str, data: bytes) -> None:
    """Make a file hold `data` or stay as it was; the caller syncs its folder.

    Args:
        folder: the descriptor of its folder.
        name: its name in there.
        data: the bytes; everybody may read and write them whom the umask allows.

    Raises:
        OSError: the file system refused; no temporary file is left behind.
    """
    temporary = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def is_being_written(temporary: Path, age_s: float) -> bool:
    """Tell whether the process that began a temporary file may still be there to finish it.

    After a day it may not: the number may be that of another process, or of one in another container.
    """
    if age_s > _DAY_S:
        return False
    pid = temporary.name.removeprefix(TEMPORARY).partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


@contextmanager
def locked(path: Path, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock, which the system drops when this process ends, however it ends.

    Args:
        path: the lock file, created when missing; it never holds anything.
        exclusive: alone, or together with others that are not.
        wait: for as long as others hold it.

    Yields:
        False where the file system knows no locks.

    Raises:
        AccessError: the lock file cannot be opened, or it is held and `wait` is False.
    """
    fd, held = _lock(path, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    try:
        yield held
    finally:
        os.close(fd)


def _lock(path: Path, how: int) -> tuple[int, bool]:
    """Open and lock the file that has this name, not one that had it."""
    while True:
        with accessing(path, "lock"):
            fd = _open_lock(path)
            try:
                try:
                    fcntl.flock(fd, how)
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        return fd, False
                    raise
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return fd, True
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _open_lock(path: Path) -> int:
    """Open the lock file, which is created when missing; one that others may not write is only read.

    A local file system locks either. NFS wants a file that is open for writing where the lock is exclusive.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:
        if error.errno not in _READ_ONLY or not os.path.lexists(path):
            raise
    return os.open(path, os.O_RDONLY | flags)
