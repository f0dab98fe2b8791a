"""Files that appear whole or not at all, that outlive a power cut, and that are read with every surprise named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, IntegrityError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPORARY = ".tmp-"
"""How the name of an unfinished file begins."""

Identity = tuple[int, int]
"""Device and inode: which file it is, whatever its name has become."""

_STEP_BYTES = 1 << 20
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class DamagedFile(IntegrityError):
    """A regular file was read whole, and its bytes are proven not to be those that its name promises.

    Attributes:
        path: the name under which it was read.
        identity: which file it was.
    """

    def __init__(self, message: str, path: Path, identity: Identity) -> None:
        super().__init__(message)
        self.path, self.identity = path, identity


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
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise LayoutError(f"{path}: file type: {what} must be a regular file")
    return fd, info


def read_regular(path: Path, what: str, limit_bytes: int) -> tuple[bytes, Identity]:
    """Read a small regular file whole.

    Returns:
        Its bytes, and which file it was.

    Raises:
        FileNotFoundError: there is none.
        LayoutError: it is no regular file, or longer than `limit_bytes`.
        AccessError: the file system refused.
    """
    fd, info = open_regular(path, what)
    try:
        parts, size = [], 0
        with accessing(path, "read"):
            while size <= limit_bytes and (part := os.read(fd, limit_bytes + 1 - size)):
                parts.append(part)
                size += len(part)
    finally:
        os.close(fd)
    if size > limit_bytes:
        raise LayoutError(f"{path}: size: {max(info.st_size, size)} bytes are over the limit of {limit_bytes}")
    return b"".join(parts), (info.st_dev, info.st_ino)


def holds(path: Path, what: str, data: bytes) -> tuple[bool, Identity]:
    """Tell whether a regular file holds exactly these bytes, and which file it is.

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
        return place == len(data) == info.st_size, (info.st_dev, info.st_ino)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data` or stay as it was; its folder is created, the caller syncs it.

    Raises:
        AccessError: the file system refused; no temporary file is left behind.
    """
    with accessing(path, "write"):
        make_folder(path.parent)
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def is_being_written(temporary: Path) -> bool:
    """Tell whether the process that began a temporary file is still there to finish it."""
    pid = temporary.name.removeprefix(TEMPORARY).partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


def make_folder(path: Path) -> None:
    """Create a folder when it is missing, and make its name durable."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        AccessError: the file system refused.
    """
    with accessing(path, "fsync"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
                raise
        finally:
            os.close(fd)


@contextmanager
def locked(path: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold an advisory lock, which the system drops when this process ends, however it ends.

    Args:
        path: the lock file, created when missing; it never holds anything.
        exclusive: alone, or together with others that are not.

    Yields:
        False where the file system knows no locks.

    Raises:
        AccessError: the lock file cannot be opened.
    """
    with accessing(path, "lock"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise AccessError(path, "lock", error) from None
            yield False
        else:
            yield True
    finally:
        os.close(fd)
