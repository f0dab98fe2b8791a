"""BlockStore: a directory of write-once documents, published atomically, verified on reading."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from kvkern.errors import IntegrityError, KvkernError, LayoutError
from kvkern.layout.collect import collect
from kvkern.layout.directory import Directory
from kvkern.layout.files import DamagedFile, accessing, holds, make_folder, read_regular, sync_folder, write_atomically
from kvkern.layout.header import payload_bytes
from kvkern.layout.index import chain_keys, common_tokens, token_tensor
from kvkern.layout.leases import Leases
from kvkern.layout.manifest import MAX_MANIFEST_BYTES, Manifest
from kvkern.layout.pool import Document
from kvkern.layout.records import Collected, Defect, Explanation, Published, Report, Summary
from kvkern.layout.search import Search
from kvkern.layout.shard import encode_shard, map_shard
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, pack, require_finite_kv

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from kvkern.layout.shard import Shard
    from kvkern.spec import KVSpec

GRACE_S = 3600.0
"""How long gc leaves alone what has just been written, removed or set aside, in seconds."""

Progress = Callable[[int, int], None]
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


class BlockStore:
    """Documents in a directory; any number of processes may publish and read at once.

    Args:
        root: the directory, created when missing.

    Raises:
        LayoutError: `root` holds other files, or a store of another format.
        AccessError: the file system refused, here and in every method; nothing is lost, call again.

    Example:
        >>> import tempfile, torch
        >>> from kvkern import KVSpec
        >>> spec = KVSpec("0" * 64, "Tiny", 1, 1, 1, 64, config={})
        >>> k = torch.randn(1, 1, 300, 64).bfloat16()
        >>> with tempfile.TemporaryDirectory() as root:
        ...     store = BlockStore(root)
        ...     done = store.put(spec, list(range(300)), k, k)
        ...     document = store.get(done.digest)
        >>> done.blocks_new, len(document.shards), document.token_ids()[-1].item()
        (2, 2, 299)
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Open the store; make an empty one when there is nothing."""
        self.directory = Directory(root)
        self.root = self.directory.root
        self._leases = Leases(self.directory)
        self._search = Search(self.directory, self.manifest, self.get)

    def put(
        self,
        spec: KVSpec,
        token_ids: Tensor | Sequence[int],
        k: Tensor,
        v: Tensor,
        *,
        progress: Progress | None = None,
    ) -> Published:
        """Publish a document: missing blocks first, the manifest last, each in one atomic step.

        Args:
            spec: what made the KV.
            token_ids: `[n]` or `[1, n]` integers in [0, 2^31).
            k: `[layers, kv_heads, n, head_dim]` bf16, after RoPE.
            v: the same shape and dtype.
            progress: called with `(done, total)` payload bytes.

        Raises:
            LayoutError: an argument does not have this form, does not fit `spec`, or is not finite.
            AccessError: the file system refused; nothing is visible then, and `put` may be repeated.
        """
        ids = token_tensor(token_ids)
        for name, tensor in (("k", k), ("v", v)):
            require_finite_kv(name, tensor, (spec.num_layers, spec.num_kv_heads, ids.numel(), spec.head_dim))
        k_tiles, v_tiles = pack(k, v)

        def encoded(i: int) -> bytes:
            tiles = slice(BLOCK_TILES * i, BLOCK_TILES * (i + 1))
            tokens = ids[BLOCK_TOKENS * i : BLOCK_TOKENS * (i + 1)]
            return encode_shard(spec, BLOCK_TOKENS * i, tokens, k_tiles[tiles], v_tiles[tiles])

        counts = [min(BLOCK_TOKENS, ids.numel() - i) for i in range(0, ids.numel(), BLOCK_TOKENS)]
        sizes = [payload_bytes(spec, count) for count in counts]
        done = _in_threads(lambda i: self._put_block(encoded(i)), range(len(sizes)), sizes, progress)
        manifest = Manifest(spec, ids.numel(), tuple(block_id for block_id, _ in done))
        self._commit(manifest, encoded)
        self._search.write(manifest, chain_keys(spec.digest, ids))
        new = sum(is_new for _, is_new in done)
        return Published(manifest.digest, ids.numel(), new, len(done) - new, sum(sizes))

    def get(self, digest: str, *, verify: str = "auto", progress: Progress | None = None) -> Document:
        """Map and verify a document's blocks.

        Args:
            digest: its name, or a unique beginning of 8 hex digits or more.
            verify: `auto` or `sha256`, see `map_shard`.
            progress: called with `(done, total)` payload bytes.

        Raises:
            IntegrityError: stored bytes are damaged or missing; the message names the file.
            LayoutError: unknown or ambiguous digest, or a file of another form.
            SpecMismatchError: a block belongs to another spec than the manifest.
        """
        digest = self.resolve(digest)
        holder = _Holder()
        self._leases.hold(holder, digest)  # before anything is read: gc sees either the lease or the document
        manifest = self.manifest(digest)
        shards = _in_threads(
            lambda i: self._shard(manifest, i, verify),
            range(len(manifest.blocks)),
            [payload_bytes(manifest.spec, manifest.count(i)) for i in range(len(manifest.blocks))],
            progress,
        )
        return Document(manifest, tuple(shards), holder)

    def manifest(self, digest: str) -> Manifest:
        """Read one manifest by its digest or a unique beginning of it.

        Raises:
            IntegrityError: the file's bytes are damaged; it has been moved to quarantine.
            LayoutError: unknown or ambiguous digest, or a file of another form.
        """
        full = self.resolve(digest)
        path = self.manifest_path(full)
        try:
            data, identity = read_regular(path, "a manifest", MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise LayoutError(f"{path}: file: the document has just been removed") from None
        if hashlib.sha256(data).hexdigest() != full:
            text = f"{path}: SHA-256: the bytes have {hashlib.sha256(data).hexdigest()}, the name promises another"
            raise self._quarantined(DamagedFile(text, path, identity))
        return Manifest.from_bytes(data, full)

    def resolve(self, prefix: str) -> str:
        """Complete the beginning of a digest.

        Args:
            prefix: 8 to 64 lower-case hex digits.

        Raises:
            LayoutError: too short, unknown, or the beginning of several documents' names.
        """
        return self.directory.resolve(prefix)

    def find(self, spec_digest: str, token_ids: Tensor | Sequence[int]) -> list[tuple[str, int]]:
        """Find documents that begin like the given tokens.

        The answer is a hint taken from unverified files: compare `Document.token_ids()` before use.

        Args:
            spec_digest: `KVSpec.digest`; other specs never match.
            token_ids: `[n]` or `[1, n]` integers in [0, 2^31).

        Returns:
            `(manifest digest, leading tokens shared)`, longest first, none with 0.

        Raises:
            LayoutError: `token_ids` does not have this form.
        """
        return self._search.find(spec_digest, token_ids)

    def match(self, spec_digest: str, token_ids: Tensor | Sequence[int]) -> tuple[Document, int] | None:
        """Open the document that shares the most leading tokens, counted over its verified blocks.

        Args:
            spec_digest: `KVSpec.digest`.
            token_ids: `[n]` or `[1, n]` integers in [0, 2^31).

        Returns:
            The document and how many leading tokens it shares, or None. Damaged candidates are passed over with a
            warning.

        Raises:
            LayoutError: `token_ids` does not have this form.
        """
        query, best = token_tensor(token_ids), None
        for digest, promised in self.find(spec_digest, query):
            if best is not None and promised <= best[1]:
                break
            try:
                document = self.get(digest)
            except KvkernError as error:
                warnings.warn(f"document {digest} is passed over: {error}", stacklevel=2)
                continue
            shared = common_tokens(query, document.token_ids())
            if best is None or shared > best[1]:
                best = document, shared
        return best if best and best[1] else None

    def why(self, token_ids: Tensor | Sequence[int], spec: KVSpec | None = None) -> list[Explanation]:
        """Explain for every document how far it serves some tokens, and what differs.

        Args:
            token_ids: `[n]` or `[1, n]` integers in [0, 2^31).
            spec: what the reader has; None compares tokens alone.

        Returns:
            Usable documents first, most tokens first. A hint from unverified files, as `find`.

        Raises:
            LayoutError: `token_ids` does not have this form.
        """
        return self._search.why(token_ids, spec)

    def ls(self) -> list[Summary]:
        """List the documents by digest; a damaged manifest is left out with a warning."""
        lines = []
        for digest, path in self.directory.lost().items():
            warnings.warn(f"{path}: the manifest of document {digest} is damaged; publish it again", stacklevel=2)
        for digest in self.directory.digests():
            try:
                m = self.manifest(digest)
            except KvkernError as error:
                warnings.warn(f"left out of the list: {error}", stacklevel=2)
                continue
            lines.append(Summary(digest, m.num_tokens, len(m.blocks), m.payload_bytes, m.spec))
        return lines

    def verify(self, digest: str | None = None, progress: Progress | None = None) -> Report:
        """Read every byte of one document, or of all, through SHA-256 and collect all defects.

        Files whose bytes are proven wrong move to quarantine.

        Args:
            digest: the document, or None for all.
            progress: called with `(done, total)` payload bytes.

        Raises:
            LayoutError: unknown or ambiguous digest.
        """
        lost = self.directory.lost() if digest is None else {}
        advice = "manifest: damaged; publish the document again, or delete this file to give it up"
        defects = [Defect(name, path, f"{path}: {advice}") for name, path in lost.items()]
        manifests: list[Manifest] = []
        for name in self.directory.digests() if digest is None else [self.resolve(digest)]:
            try:
                manifests.append(self.manifest(name))
            except KvkernError as error:
                defects.append(Defect(name, self.manifest_path(name), str(error)))
        jobs = [(manifest, i) for manifest in manifests for i in range(len(manifest.blocks))]

        def check(job: tuple[Manifest, int]) -> Defect | None:
            manifest, i = job
            try:
                self._shard(manifest, i, "sha256")
            except KvkernError as error:
                return Defect(manifest.digest, self.block_path(manifest.blocks[i]), str(error))
            return None

        sizes = [payload_bytes(manifest.spec, manifest.count(i)) for manifest, i in jobs]
        defects += [defect for defect in _in_threads(check, jobs, sizes, progress) if defect]
        return Report(len(manifests), len(jobs), sum(sizes), tuple(defects))

    def remove(self, digest: str) -> str:
        """Take a document out of the store's list; gc takes its blocks when nobody holds or needs them.

        Readers that have it open read on.

        Args:
            digest: its name, or a unique beginning of 8 hex digits or more.

        Returns:
            The full digest.

        Raises:
            LayoutError: unknown or ambiguous digest.
        """
        full = self.resolve(digest)
        path, target = self.manifest_path(full), self.root / "removed" / f"{full}.json"
        with self.directory.lock(exclusive=False), accessing(path, "remove"):
            make_folder(target.parent)
            os.utime(path)  # gc counts the grace period from here
            os.replace(path, target)
        sync_folder(target.parent)
        sync_folder(path.parent)
        return full

    def gc(self, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
        """Take back the space of blocks that no document needs, in two runs that are a grace period apart.

        Args:
            grace_s: seconds that a file must have been left alone before it is set aside, and again before it is
                deleted.
            dry_run: say what would be done, and do nothing.

        Raises:
            KvkernError: what the documents need cannot be told; then nothing has been done.
        """
        if grace_s < 0:
            raise LayoutError(f"grace_s must be at least 0 seconds, got {grace_s}")
        return collect(self.directory, grace_s=grace_s, dry_run=dry_run)

    def block_path(self, block_id: str) -> Path:
        """Path of a block's shard."""
        return self.directory.block_path(block_id)

    def manifest_path(self, digest: str) -> Path:
        """Path of a manifest."""
        return self.directory.manifest_path(digest)

    def _put_block(self, data: bytes) -> tuple[str, bool]:
        """Make the store hold a block; a file in its place with other bytes goes to quarantine first."""
        block_id = hashlib.sha256(data).hexdigest()
        path = self.block_path(block_id)
        try:
            is_there, identity = holds(path, "a block", data)
            if is_there:
                return block_id, False
            self.directory.quarantine(DamagedFile("", path, identity))
        except FileNotFoundError:
            pass
        with accessing(path, "write"):
            make_folder(self.root / "blocks")
        write_atomically(path, data)
        return block_id, True

    def _commit(self, manifest: Manifest, encoded: Callable[[int], bytes]) -> None:
        """Make the document visible, in one step, when every block is there and durable."""
        with self.directory.lock(exclusive=False):  # from here on gc neither looks nor moves
            for i, block_id in enumerate(manifest.blocks):
                if not os.path.lexists(self.block_path(block_id)):  # gc met it before the manifest named it
                    write_atomically(self.block_path(block_id), encoded(i))
            # Reused blocks too: another process may have renamed them and not yet made that durable.
            for folder in {self.block_path(block_id).parent for block_id in manifest.blocks}:
                sync_folder(folder)
            path = self.manifest_path(manifest.digest)
            write_atomically(path, manifest.to_bytes())
            sync_folder(path.parent)

    def _shard(self, manifest: Manifest, i: int, verify: str) -> Shard:
        block_id = manifest.blocks[i]
        try:
            shard = map_shard(self.block_path(block_id), block_id, manifest.spec, verify=verify)
        except DamagedFile as damaged:
            raise self._quarantined(damaged) from None
        if (shard.first, shard.count) != (BLOCK_TOKENS * i, manifest.count(i)):
            raise IntegrityError(
                f"{self.manifest_path(manifest.digest)}: blocks[{i}]: {block_id} must have first {BLOCK_TOKENS * i} "
                f"and count {manifest.count(i)}, but has {shard.first} and {shard.count}. The manifest is wrong: "
                "publish the document again."
            )
        return shard

    def _quarantined(self, damaged: DamagedFile) -> IntegrityError:
        return IntegrityError(f"{damaged}. {self.directory.quarantine(damaged)}")


class _Holder:
    """What a lease lives as long as."""


def _in_threads(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    sizes: Sequence[int],
    progress: Progress | None,
) -> list[_Result]:
    """Map `work` over items, reporting the bytes behind the items done; the first error ends it."""
    results, done, total = [], 0, sum(sizes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future, size in zip(futures, sizes, strict=True):
                results.append(future.result())
                done += size
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results
