"""Reading: manifests and blocks, each checked whole before anything of it is handed out; what is wrong is set aside."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kvkern.errors import AccessError, IntegrityError, KvkernError, LayoutError
from kvkern.layout.files import DamagedFile, OversizedFile, read_regular
from kvkern.layout.header import max_shard_bytes, payload_bytes
from kvkern.layout.manifest import MAX_MANIFEST_BYTES, Manifest
from kvkern.layout.parallel import in_parallel
from kvkern.layout.records import Defect, Report
from kvkern.layout.shard import Verification, shard_of
from kvkern.layout.tiles import BLOCK_TOKENS
from kvkern.spec import is_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvkern.layout.directory import Directory
    from kvkern.layout.parallel import Progress
    from kvkern.layout.shard import Shard, VerifiedBytes


MAX_TABLE_BYTES = 1 << 28


class RemovedError(LayoutError):
    """The document was there a moment ago."""


def read_manifest(directory: Directory, digest: str) -> Manifest:
    """Read one manifest by its full digest; see `BlockStore.manifest`."""
    path = directory.manifest_path(digest)
    try:
        data = _read_named(directory, path, "a manifest", MAX_MANIFEST_BYTES, digest)
    except FileNotFoundError:
        raise RemovedError(f"{path}: file: the document has just been removed") from None
    return Manifest.from_bytes(data, digest)


def read_table(directory: Directory, digest: str) -> bytes:
    """Read a table by its digest; see `BlockStore.table`."""
    if not is_digest(digest):  # it comes from somebody's manifest, and is going to be a path
        raise LayoutError(f"table digest is {digest!r}; it must be 64 lower-case hex digits")
    path = directory.table_path(digest)
    try:
        return _read_named(directory, path, "a table", MAX_TABLE_BYTES, digest)
    except FileNotFoundError:
        text = f"{path}: file: the table is missing; publish a document of this model with producer 'contract' again"
        raise IntegrityError(text) from None


def _read_named(directory: Directory, path: Path, what: str, limit_bytes: int, digest: str) -> bytes:
    """Read a small file that is named by its SHA-256; one that is proven to be another goes to quarantine."""
    try:
        data = read_regular(path, what, limit_bytes)
    except OversizedFile as error:
        raise _quarantined(directory, DamagedFile(str(error), path, digest, limit_bytes)) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        text = f"{path}: SHA-256: the bytes have {found}, the name promises {digest}"
        raise _quarantined(directory, DamagedFile(text, path, digest, limit_bytes))
    return data


def require_distinct_blocks(directory: Directory, manifest: Manifest) -> None:
    """Refuse a manifest that repeats a block: a block knows its place in its document, so it has one.

    Cheap to tell before a block is opened, dear afterwards: a manifest may repeat one 60,000 times.

    Raises:
        IntegrityError: it does.
    """
    if len(set(manifest.blocks)) == len(manifest.blocks):
        return
    places: dict[str, int] = {}
    for i, block_id in enumerate(manifest.blocks):
        first = places.setdefault(block_id, i)
        if first != i:
            raise IntegrityError(
                f"{directory.manifest_path(manifest.digest)}: blocks[{i}]: {block_id} is blocks[{first}] too, but a "
                "block has one place. The manifest is wrong: remove the document, and publish it again."
            )


def map_blocks(directory: Directory, manifest: Manifest, verify: str, progress: Progress | None) -> list[Shard]:
    """Map and verify all blocks of a document; see `BlockStore.get`.

    The last block is begun before the others and finished after them, so that all threads end together: seven and a
    half blocks each, not eight and seven. Python that runs beside two hashing threads costs them more than it takes
    alone, so headers are read when all bytes have been.
    """
    require_distinct_blocks(directory, manifest)
    sizes = [payload_bytes(manifest.spec, manifest.count(i)) for i in range(len(manifest.blocks))]
    last = len(sizes) - 1
    begun: Future[Verification] = Future()

    def begin() -> None:
        try:
            check = _verification(directory, manifest, last, verify)
            check.begin()
            begun.set_result(check)
        except BaseException as error:
            begun.set_exception(error)
            raise

    jobs = [begin, *(partial(_map_bytes, directory, manifest, i, verify) for i in range(last))]
    jobs += [lambda: _finished(directory, begun.result())]
    half = sizes[last] // 2
    parts = list(in_parallel(lambda job: job(), jobs, [half, *sizes[:last], sizes[last] - half], progress))[1:]
    return [_shard(directory, manifest, i, part) for i, part in enumerate(parts)]


def _map_bytes(directory: Directory, manifest: Manifest, i: int, verify: str) -> VerifiedBytes:
    return _finished(directory, _verification(directory, manifest, i, verify))


def _verification(directory: Directory, manifest: Manifest, i: int, verify: str) -> Verification:
    block_id, limit_bytes = manifest.blocks[i], max_shard_bytes(manifest.spec, manifest.count(i))
    with _setting_aside(directory):
        return Verification(directory.block_path(block_id), block_id, verify, limit_bytes)


def _finished(directory: Directory, check: Verification) -> VerifiedBytes:
    with _setting_aside(directory):
        return check.finish()


@contextmanager
def _setting_aside(directory: Directory) -> Iterator[None]:
    try:
        yield
    except DamagedFile as damaged:
        raise _quarantined(directory, damaged) from None


def _shard(directory: Directory, manifest: Manifest, i: int, part: VerifiedBytes) -> Shard:
    shard = shard_of(part, manifest.spec)
    if (shard.first, shard.count) != (BLOCK_TOKENS * i, manifest.count(i)):
        raise IntegrityError(
            f"{directory.manifest_path(manifest.digest)}: blocks[{i}]: {shard.block_id} must have first "
            f"{BLOCK_TOKENS * i} and count {manifest.count(i)}, but has {shard.first} and {shard.count}. The manifest "
            "is wrong: publish the document again."
        )
    return shard


def check_documents(directory: Directory, digests: Sequence[str], progress: Progress | None) -> Report:
    """Read every byte of some documents; see `BlockStore.verify`. The caller holds leases on them."""
    defects: list[Defect] = []
    manifests: list[Manifest] = []
    for digest in digests:
        try:
            manifest = read_manifest(directory, digest)
            require_distinct_blocks(directory, manifest)
            manifests.append(manifest)
        except AccessError:  # proves nothing
            raise
        except RemovedError:
            continue
        except KvkernError as error:
            defects.append(Defect(digest, directory.manifest_path(digest), str(error)))
    defects += _table_defects(directory, manifests)
    jobs = [(manifest, i) for manifest in manifests for i in range(len(manifest.blocks))]

    def check(job: tuple[Manifest, int]) -> Defect | None:
        manifest, i = job
        try:
            _shard(directory, manifest, i, _map_bytes(directory, manifest, i, "sha256"))
        except AccessError:
            raise
        except KvkernError as error:
            return Defect(manifest.digest, directory.block_path(manifest.blocks[i]), str(error))
        return None

    sizes = [payload_bytes(manifest.spec, manifest.count(i)) for manifest, i in jobs]
    defects += [defect for defect in in_parallel(check, jobs, sizes, progress) if defect]
    return Report(len(manifests), len(jobs), sum(sizes), tuple(defects))


def _table_defects(directory: Directory, manifests: Sequence[Manifest]) -> list[Defect]:
    """Check the tables that documents were computed with; one that is not here harms no reader that has its own."""
    defects, checked = [], set()
    for manifest in manifests:
        name = manifest.spec.producer_info.get("rope_table")
        if not is_digest(name) or name in checked or not os.path.lexists(directory.table_path(name)):
            continue
        checked.add(name)
        try:
            read_table(directory, name)
        except AccessError:
            raise
        except KvkernError as error:
            defects.append(Defect(manifest.digest, directory.table_path(name), str(error)))
    return defects


def _quarantined(directory: Directory, damaged: DamagedFile) -> IntegrityError:
    try:
        done = directory.quarantine(damaged, wait=False)
    except LayoutError as error:  # refused by the file system, or a folder is a link
        done = f"It could not be moved to quarantine now ({error}) and stays refused."
    return IntegrityError(f"{damaged}. {done}")
