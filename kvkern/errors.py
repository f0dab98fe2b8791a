"""The errors that kvkern raises on purpose: one family, each saying what was given, what is allowed, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os


class KvkernError(Exception):
    """Base class of every error that kvkern raises on purpose."""


class IntegrityError(KvkernError):
    """Stored bytes are not the bytes that their digest names."""


class LayoutError(KvkernError):
    """A file, tensor or table does not have the form that FORMAT.md or the call requires."""


class AccessError(LayoutError, OSError):
    """The file system refused: permission, no space, too many open files, input or output error.

    That proves nothing about the file: it is left where it is, and the call may be repeated.

    Args:
        path: the file or directory.
        operation: what was refused, such as `open`.
        error: what the system said; its `errno` is kept.
    """

    def __init__(self, path: str | os.PathLike[str], operation: str, error: OSError) -> None:
        self.path, self.operation = path, operation
        super().__init__(error.errno, f"{path}: {operation}: {error.strerror or error}. {_remedy(error)}")

    def __str__(self) -> str:
        return self.strerror

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class UnsupportedError(KvkernError):
    """The request is well-formed, but outside what kvkern computes."""


class SpecMismatchError(KvkernError):
    """KV was made by something else than what wants to read it.

    Attributes:
        field: dotted name of the first differing field, such as `config.rope_theta`.
        stored: its value in the published document.
        wanted: its value in the reader.
    """

    def __init__(self, field: str, stored: Any, wanted: Any) -> None:
        self.field, self.stored, self.wanted = field, stored, wanted
        super().__init__(
            f"spec field {field!r} differs: the document was published with {stored!r}, the reader has "
            f"{wanted!r}. Open it with the model that published it, or publish it again with this one."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class KVMismatchError(KvkernError):
    """Stored KV is not what this model computes from the stored tokens."""


def _rebuild(kind: type[Exception], arguments: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    """Unpickle an error whose constructor takes other arguments than Exception keeps."""
    error = kind.__new__(kind)
    Exception.__init__(error, *arguments)
    if isinstance(error, OSError):
        OSError.__init__(error, *arguments)
    error.__dict__.update(state)
    return error


def _remedy(error: OSError) -> str:
    import errno

    return {
        errno.EMFILE: "Raise the limit of open files (ulimit -n) or close some, then try again.",
        errno.ENFILE: "The system is out of open files; close some, then try again.",
        errno.ENOSPC: "Free some space, then try again; nothing is published.",
        errno.EDQUOT: "Free some of your quota, then try again; nothing is published.",
        errno.EROFS: "The file system is read-only: reading works, publishing needs a writable one.",
        errno.EACCES: "Ask for permission to this path, then try again.",
        errno.EPERM: "Ask for permission to this path, then try again.",
        errno.EIO: "The device failed to read or write; the file was left in place, try again.",
        errno.ENOMEM: "The system gave no memory, or no more mappings (sysctl vm.max_map_count); then try again.",
        errno.EWOULDBLOCK: "Another process holds the store's lock; try again.",
        errno.ELOOP: "It must not be a link: put the file itself in its place, then try again.",
        errno.EXDEV: "The store's folders must lie on one file system.",
    }.get(error.errno or 0, "The file was left in place; try again.")
