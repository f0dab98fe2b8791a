"""Folders: the real directories below a store's root, opened one below the other without following a link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, LayoutError
from kvkern.layout.files import accessing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def open_folder(root: Path, path: Path, *, create: bool = False) -> Iterator[int]:
    """Open a folder of a store; what is done relative to its descriptor (`dir_fd`) is done in no other place.

    Args:
        root: the store's directory; it may be a link.
        path: the folder, `root` or below it.
        create: when it is missing, and make its name durable.

    Yields:
        The folder's descriptor.

    Raises:
        FileNotFoundError: it is missing.
        LayoutError: it, or a folder between it and `root`, is a link, or no folder.
        AccessError: the file system refused.
    """
    with accessing(root, "open"):
        fd = os.open(root, _DIRECTORY)
    place = str(root)
    try:
        for name in filter(None, str(path)[len(place) :].split("/")):  # strings: pathlib takes longer than the system
            place = f"{place}/{name}"
            parent, fd = fd, _open_child(fd, name, place, create=create)
            os.close(parent)
        yield fd
    finally:
        os.close(fd)


def sync_folder(fd: int) -> None:
    """Make the names in an open folder durable."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise


def _open_child(parent: int, name: str, path: str, *, create: bool) -> int:
    """Open the folder `name` in an open one; `path` is for the message."""
    try:
        try:
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError:
            if not create:
                raise
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            os.mkdir(name, dir_fd=parent)
        sync_folder(parent)
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            raise LayoutError(
                f"{path}: file type: it is {'a link' if is_link else 'no folder'}, and a store is changed in real "
                "folders only: put the folder itself in its place, or link the store as a whole."
            ) from None
        raise AccessError(path, "open", error) from None
