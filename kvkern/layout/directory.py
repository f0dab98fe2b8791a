"""Directory: where the files of a store lie, which are there, its lock, and its quarantine."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, LayoutError
from kvkern.layout.files import (
    TEMPORARY,
    accessing,
    has_digest,
    locked,
    open_regular,
    read_regular,
    write_atomically,
)
from kvkern.layout.folders import open_folder, sync_folder
from kvkern.spec import is_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from kvkern.layout.files import DamagedFile

FORMAT = "kvkern-store-v1"
FOLDERS = ("blocks", "manifests", "index", "tables", "removed", "condemned", "quarantine", "leases")
_MARKER_LIMIT_BYTES = 4096


class Directory:
    """The files of a store.

    Args:
        root: the directory, created when missing.

    Raises:
        LayoutError: `root` holds other files, or a store of another format.
        AccessError: the file system refused.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Open the store, or make an empty one; a store that is there is not written to."""
        try:
            self.root = Path(root).absolute()
        except TypeError:
            raise LayoutError(f"root must be the path of a directory, got {root!r}") from None
        if "\0" in str(self.root):
            raise LayoutError(f"root must be the path of a directory, got {root!r}")
        with accessing(self.root, "create"):
            self.root.mkdir(parents=True, exist_ok=True)
        self._check_marker()

    def block_path(self, block_id: str) -> Path:
        """Path of a block's shard."""
        return self.root / "blocks" / block_id[:2] / f"{block_id}.safetensors"

    def manifest_path(self, digest: str) -> Path:
        """Path of a manifest."""
        return self.root / "manifests" / f"{digest}.json"

    def index_path(self, digest: str) -> Path:
        """Path of a manifest's index file."""
        return self.root / "index" / f"{digest}.json"

    def table_path(self, digest: str) -> Path:
        """Path of a table that documents were computed with."""
        return self.root / "tables" / f"{digest}.bin"

    def digests(self) -> list[str]:
        """Names of the published documents, sorted."""
        names = (name.removesuffix(".json") for name in self.names("manifests") if name.endswith(".json"))
        return sorted(filter(is_digest, names))

    def folder(self, path: Path, *, create: bool = False) -> AbstractContextManager[int]:
        """Open a folder of the store that is going to be changed; see `open_folder`."""
        return open_folder(self.root, path, create=create)

    def require_real_folders(self) -> None:
        """Refuse a store in which a folder is a link, before anything is changed.

        Raises:
            LayoutError: one is; the message names it.
        """
        with accessing(self.root, "list"), os.scandir(self.root) as entries:
            wrong = [e.name for e in entries if e.name in FOLDERS and not e.is_dir(follow_symlinks=False)]
        for name in wrong:
            with self.folder(self.root / name):  # which says what it is
                pass

    def write(self, path: Path, data: bytes) -> None:
        """Make a file of the store hold `data` or stay as it was; its folder is created, the caller syncs it.

        Raises:
            LayoutError: a folder is a link.
            AccessError: the file system refused; no temporary file is left behind.
        """
        with accessing(path, "write"), self.folder(path.parent, create=True) as folder:
            write_atomically(folder, path.name, data)

    def move(self, source: Path, target: Path, *, touch: bool = False) -> None:
        """Rename a file of the store; the target's folder is created, and nothing is synced.

        Args:
            source: the file.
            target: its new name; a file of that name is replaced.
            touch: let its age, of which gc takes account, begin now.

        Raises:
            OSError: the file system refused.
            LayoutError: a folder is a link.
        """
        with self.folder(source.parent) as old, self.folder(target.parent, create=True) as new:
            if touch:
                with contextlib.suppress(PermissionError):  # another user's file: renaming it renews its ctime
                    os.utime(source.name, dir_fd=old, follow_symlinks=False)
            os.rename(source.name, target.name, src_dir_fd=old, dst_dir_fd=new)

    def delete(self, path: Path) -> None:
        """Delete a file of the store, if it is there.

        Raises:
            LayoutError: a folder is a link.
            AccessError: the file system refused.
        """
        with (
            accessing(path, "delete"),
            contextlib.suppress(FileNotFoundError),
            self.folder(path.parent) as folder,
        ):
            os.unlink(path.name, dir_fd=folder)

    def sync(self, folder: Path) -> None:
        """Make the names in a folder of the store durable.

        Raises:
            LayoutError: it is a link.
            AccessError: the file system refused.
        """
        with accessing(folder, "fsync"), self.folder(folder) as fd:
            sync_folder(fd)

    def names(self, folder: str) -> list[str]:
        """List a folder of the store, an absent one as empty."""
        path = self.root / folder
        with accessing(path, "list"):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def resolve(self, prefix: str) -> str:
        """Complete the beginning of a digest.

        Args:
            prefix: 8 to 64 lower-case hex digits.

        Raises:
            LayoutError: too short, unknown, or the beginning of several documents' names.
        """
        if not isinstance(prefix, str) or not re.fullmatch(r"[0-9a-f]{8,64}", prefix):
            raise LayoutError(f"digest: got {prefix!r}, allowed are 8 to 64 lower-case hex digits")
        if len(prefix) == 64 and os.path.lexists(self.manifest_path(prefix)):
            return prefix
        known = self.digests()
        found = [digest for digest in known if digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise LayoutError(f"digest {prefix} is ambiguous: {', '.join(found[:4])}. Give more digits.")
        lost = [path for digest, path in self.lost().items() if digest.startswith(prefix)]
        if lost:
            raise LayoutError(f"{lost[0]}: manifest: the one of digest {prefix} is damaged; publish the document again")
        near = sorted(known, key=lambda d: -len(os.path.commonprefix([d, prefix])))[:4]
        listing = f"nearby are {', '.join(near)}" if near else "the store is empty"
        raise LayoutError(f"digest {prefix} is not in {self.root}: {listing}")

    @contextmanager
    def lock(self, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
        """Hold the store's lock: a publisher's writes share it, gc and quarantine hold it alone.

        Yields:
            False where the file system knows no locks.

        Raises:
            AccessError: it cannot be had, or not at once if `wait` is False.
        """
        with locked(self.root / "lock", exclusive=exclusive, wait=wait) as held:
            yield held

    def quarantine(self, damaged: DamagedFile, *, wait: bool) -> str:
        """Take a file that is proven wrong out of readers' way, without deleting it.

        It is read whole again first, alone with it: the file that was read may have been replaced or healed. One that
        is longer than it may be is not read.

        Args:
            damaged: names the file and what it should be.
            wait: for others that hold the store's lock.

        Returns:
            What was done, in words that end an error message.

        Raises:
            AccessError: it cannot be moved.
            LayoutError: its folder, or quarantine, is a link.
        """
        path, name = damaged.path, f"{damaged.path.name}.{secrets.token_hex(4)}"
        target = self.root / "quarantine" / name
        with self.lock(exclusive=True, wait=wait), accessing(path, "move to quarantine"):
            try:
                fd, info = open_regular(path, "a file of the store")
            except FileNotFoundError:
                return "It is gone meanwhile: try again."
            try:
                if has_digest(fd, damaged.digest, damaged.limit_bytes):
                    return "It has been replaced meanwhile: try again."
                self.move(path, target)
                if not os.path.samestat(info, os.lstat(target)):  # replaced between reading and moving: it goes back
                    self.move(target, path)
                    return "It has been replaced meanwhile: try again."
            finally:
                os.close(fd)
        return (
            f"It was moved to quarantine/{name}. Publish its document again, or copy the file from another store under "
            f"a name that begins with {TEMPORARY} and rename it."
        )

    def lost(self) -> dict[str, Path]:
        """Documents whose manifest is in quarantine and that nobody has published again since, with that file."""
        names = [name for name in self.names("quarantine") if re.fullmatch(r"[0-9a-f]{64}\.json\.[0-9a-f]+", name)]
        files = {name[:64]: self.root / "quarantine" / name for name in names}
        return {digest: path for digest, path in files.items() if not os.path.lexists(self.manifest_path(digest))}

    def mark_healed(self, digest: str) -> None:
        """Rename quarantined manifests of a document that is published again: it is no longer lost."""
        for name in self.names("quarantine"):
            if re.fullmatch(rf"{digest}\.json\.[0-9a-f]+", name):
                path = self.root / "quarantine" / name
                with accessing(path, "rename"), contextlib.suppress(FileNotFoundError):  # another publisher was faster
                    self.move(path, path.with_name(f"{name}.healed"))

    def _check_marker(self) -> None:
        marker = self.root / "format"
        try:
            data = read_regular(marker, "the store's format marker", _MARKER_LIMIT_BYTES)
        except FileNotFoundError:
            strange = {n for n in self.names(".") if not n.startswith(TEMPORARY)} - {"format", "lock", *FOLDERS}
            if strange:
                raise LayoutError(f"{self.root}: not a kvkern store; give a new or an empty directory") from None
            self.write(marker, FORMAT.encode())
            self.sync(self.root)
            with accessing(self.root.parent, "fsync"), open_folder(self.root.parent, self.root.parent) as parent:
                sync_folder(parent)
            return
        found = data.decode(errors="replace").strip()
        if found == FORMAT:
            return
        if re.fullmatch(r"kvkern-store-v\d+", found) or not set(self.names(".")) & {"manifests", "blocks"}:
            raise LayoutError(
                f"{marker}: format is {found[:64]!r}, this kvkern reads {FORMAT!r}. "
                "Use the kvkern that wrote the store, or another directory."
            )
        warnings.warn(f"{marker}: damaged ({found[:64]!r}), rebuilt as {FORMAT!r}", stacklevel=4)
        try:
            self.write(marker, FORMAT.encode())
        except AccessError as error:
            warnings.warn(f"{marker}: could not be rebuilt ({error.strerror}); ignored", stacklevel=4)
