"""Collect: gc of a store, by marking from manifests; nothing is deleted that was not set aside by an earlier run."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, KvkernError, LayoutError
from kvkern.layout.files import (
    TEMPORARY,
    accessing,
    has_digest,
    is_being_written,
    open_regular,
    read_regular,
)
from kvkern.layout.header import MAX_SHARD_BYTES
from kvkern.layout.leases import live_leases
from kvkern.layout.manifest import MAX_MANIFEST_BYTES, Manifest
from kvkern.layout.records import Collected
from kvkern.spec import is_digest

if TYPE_CHECKING:
    from pathlib import Path

    from kvkern.layout.directory import Directory

_SUFFIX = ".safetensors"


def collect(directory: Directory, *, grace_s: float, dry_run: bool) -> Collected:
    """Take back the space of blocks that no document needs, in two phases.

    Phase one moves a block that nothing has needed for the grace period to `condemned/`; phase two, in a later run
    after another grace period, deletes it, or moves it back if a document needs it again. A document needs its
    blocks while it is published, and after its removal while a reader holds a lease on it or the grace period lasts.
    Every step is one rename or one unlink, so a run may be killed anywhere.

    Args:
        directory: the store.
        grace_s: seconds that a file must have been left alone.
        dry_run: say what would be done, and do nothing.

    Raises:
        KvkernError: what the documents need cannot be told; then nothing has been done.
    """
    with directory.lock(exclusive=True) as is_locked:
        if not is_locked:
            raise LayoutError(
                f"{directory.root}: lock: this file system knows no locks, so publishers cannot be kept out. Run gc "
                "on a machine where the store is a local file system."
            )
        plan = _Plan(directory, grace_s)
        plan.mark()
        plan.condemned()
        plan.blocks()
        plan.leftovers()
        if not dry_run:
            plan.carry_out()
    return plan.result(dry_run)


@dataclass
class _Plan:
    """What one run is going to do; all decisions are taken before the first change."""

    directory: Directory
    grace_s: float
    now: float = field(default_factory=time.time)
    needed: set[str] = field(default_factory=set)
    documents: int = 0
    held: int = 0
    restore: list[Path] = field(default_factory=list)
    condemn: list[Path] = field(default_factory=list)
    delete_blocks: list[Path] = field(default_factory=list)
    delete_others: list[Path] = field(default_factory=list)
    freed_bytes: int = 0

    def mark(self) -> None:
        """Find out which blocks the documents need, or refuse to guess."""
        self.directory.require_real_folders()
        published = self.directory.digests()
        if self._block_folders() and not os.path.isdir(self.directory.root / "manifests"):
            raise LayoutError(
                f"{self.directory.root}/manifests: folder: missing, though there are blocks, so what they belong to is "
                "unknown, and nothing is collected. Put it back, or delete blocks/ to give all documents up."
            )
        for path in self.directory.lost().values():
            raise LayoutError(
                f"{path}: manifest: it is damaged, so which blocks its document needs is unknown, and nothing is "
                "collected. Publish the document again, or delete this file to give the document up."
            )
        for digest in published:
            self.needed.update(self._manifest(self.directory.manifest_path(digest), digest).blocks)
        self.documents = len(published)
        leases = live_leases(self.directory, self.delete_others)
        for path in self._paths("removed"):
            digest = path.name.removesuffix(".json")
            if not is_digest(digest):
                continue
            is_held = leases is None or leases[digest] > 0
            self.held += is_held
            if is_held or not self._is_old(path):
                self.needed.update(self._manifest(path, digest).blocks)
            else:
                self.delete_others.append(path)
        for path in self._paths("index"):
            digest = path.name.removesuffix(".json")
            if is_digest(digest) and digest not in published and self._is_file(path):
                self.delete_others.append(path)

    def condemned(self) -> None:
        """Second phase: what an earlier run has set aside goes, or goes back."""
        for path in self._paths("condemned"):
            block_id = path.name.removesuffix(_SUFFIX)
            if not is_digest(block_id) or not self._is_file(path):
                continue
            is_back = os.path.lexists(self.directory.block_path(block_id))  # published again meanwhile
            if block_id in self.needed and not is_back:
                self.restore.append(path)
            elif self._is_old(path):
                self.delete_blocks.append(path)
                with accessing(path, "stat"):
                    self.freed_bytes += os.lstat(path).st_size

    def blocks(self) -> None:
        """First phase: blocks that nothing needs."""
        for folder in self._block_folders():
            for path in self._paths(folder):
                block_id = path.name.removesuffix(_SUFFIX)
                if is_digest(block_id) and block_id not in self.needed and self._is_old(path):
                    self.condemn.append(path)

    def leftovers(self) -> None:
        """Find temporary files of publishers that were killed."""
        for folder in (".", "manifests", "index", "tables", *self._block_folders()):
            for path in self._paths(folder):
                if not path.name.startswith(TEMPORARY) or not self._is_old(path):
                    continue
                if not is_being_written(path, self._age_s(path)):
                    self.delete_others.append(path)

    def carry_out(self) -> None:
        """Change the store; folders are not synced, because a change that is lost is made again by the next run."""
        for path in self.restore:
            block_id = path.name.removesuffix(_SUFFIX)
            self._move(
                path, self.directory.block_path(block_id) if _is_whole(path, block_id) else self._quarantine(path)
            )
        for path in [*self.delete_others, *self.delete_blocks]:
            self.directory.delete(path)
        for path in self.condemn:
            self._move(path, self.directory.root / "condemned" / path.name, touch=True)  # a second grace period begins

    def result(self, dry_run: bool) -> Collected:
        """Say what was done."""
        return Collected(
            dry_run=dry_run,
            documents=self.documents,
            removed_but_held=self.held,
            blocks_needed=len(self.needed),
            blocks_condemned=len(self.condemn),
            blocks_restored=len(self.restore),
            blocks_deleted=len(self.delete_blocks),
            others_deleted=len(self.delete_others),
            bytes_freed=self.freed_bytes,
        )

    def _quarantine(self, path: Path) -> Path:
        return self.directory.root / "quarantine" / f"{path.name}.{secrets.token_hex(4)}"

    def _manifest(self, path: Path, digest: str) -> Manifest:
        try:
            return Manifest.from_bytes(read_regular(path, "a manifest", MAX_MANIFEST_BYTES), digest)
        except FileNotFoundError:
            raise LayoutError(f"{path}: file: it has just gone; run gc again") from None
        except KvkernError as error:
            if isinstance(error, AccessError):
                raise
            remedy = "Delete it" if path.parent.name == "removed" else "Publish the document again, or remove it"
            raise type(error)(
                f"{path}: {str(error).rstrip('.')}. Nothing is collected while a manifest cannot be read. {remedy}."
            ) from None

    def _block_folders(self) -> list[str]:
        return [f"blocks/{name}" for name in self.directory.names("blocks") if re.fullmatch(r"[0-9a-f]{2}", name)]

    def _paths(self, name: str) -> list[Path]:
        """List a folder, an absent one as empty, and never the folder that a link names."""
        path = self.directory.root / name
        try:
            with self.directory.folder(path) as folder, accessing(path, "list"):
                return [path / name for name in sorted(os.listdir(folder))]
        except FileNotFoundError:
            return []

    def _move(self, source: Path, target: Path, *, touch: bool = False) -> None:
        with accessing(source, f"move to {target.parent.name}"):
            self.directory.move(source, target, touch=touch)

    def _age_s(self, path: Path) -> float:
        """Seconds since a regular file was last touched; -1 for what is gone, or is something else: leave it alone."""
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return -1.0
        except OSError as error:
            raise AccessError(path, "stat", error) from None
        return max(0.0, self.now - max(info.st_mtime, info.st_ctime)) if stat.S_ISREG(info.st_mode) else -1.0

    def _is_file(self, path: Path) -> bool:
        return self._age_s(path) >= 0

    def _is_old(self, path: Path) -> bool:
        return self._age_s(path) >= self.grace_s


def _is_whole(path: Path, block_id: str) -> bool:
    fd, _ = open_regular(path, "a block")
    try:
        with accessing(path, "read"):
            return has_digest(fd, block_id, MAX_SHARD_BYTES)
    finally:
        os.close(fd)
