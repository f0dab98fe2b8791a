"""BlockStore: a directory of write-once documents, published atomically, verified on reading."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from kvkern.errors import KvkernError, LayoutError
from kvkern.layout.collect import collect
from kvkern.layout.directory import Directory
from kvkern.layout.files import accessing
from kvkern.layout.index import chain_keys, common_tokens, token_tensor
from kvkern.layout.leases import Holder, Leases
from kvkern.layout.pool import Document
from kvkern.layout.publish import publish, put_table
from kvkern.layout.reading import RemovedError, check_documents, map_blocks, read_manifest, read_table
from kvkern.layout.records import Collected, Defect, Explanation, Published, Report, Summary
from kvkern.layout.search import Search
from kvkern.spec import KVSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from kvkern.layout.manifest import Manifest
    from kvkern.layout.parallel import Progress

GRACE_S = 3600.0
"""How long gc leaves alone what has just been written, removed or set aside, in seconds."""


class BlockStore:
    """Documents in a directory; any number of processes may publish and read at once.

    Args:
        root: the directory, created when missing.

    Raises:
        LayoutError: `root` holds other files, or a store of another format; where a method changes the store: a folder
            of it is a link (`root` may be one).
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
        self._search = Search(self.directory, self._leases)

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
        _require_spec(spec)
        ids = token_tensor(token_ids)
        done, manifest = publish(self.directory, spec, ids, k, v, progress)
        self._search.write(manifest, chain_keys(spec.digest, ids))
        return done

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
        holder = Holder()
        self._leases.hold(holder, digest)  # before anything is read: gc sees either the lease or the document
        manifest = read_manifest(self.directory, digest)
        return Document(manifest, tuple(map_blocks(self.directory, manifest, verify, progress)), holder)

    def put_table(self, data: bytes) -> str:
        """Keep a table that documents are computed with, such as RoPE's; returns its SHA-256, which names it.

        Raises:
            AccessError: the file system refused.
        """
        return put_table(self.directory, data)

    def table(self, digest: str) -> bytes:
        """Read a table by its digest.

        Raises:
            IntegrityError: the file is missing, or its bytes are not those of the digest.
        """
        return read_table(self.directory, digest)

    def manifest(self, digest: str) -> Manifest:
        """Read one manifest by its digest or a unique beginning of it.

        Raises:
            IntegrityError: the file's bytes are damaged; it has been moved to quarantine.
            LayoutError: unknown or ambiguous digest, or a file of another form.
        """
        return read_manifest(self.directory, self.resolve(digest))

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

    def why(
        self,
        token_ids: Tensor | Sequence[int],
        spec: KVSpec | None = None,
        *,
        ignore: tuple[str, ...] = ("producer", "producer_info"),
    ) -> list[Explanation]:
        """Explain for every document how far it serves some tokens, and what differs.

        Args:
            token_ids: `[n]` or `[1, n]` integers in [0, 2^31).
            spec: what the reader has; None compares tokens alone.
            ignore: fields of the spec that may differ; a reader takes any producer unless it insists.

        Returns:
            Usable documents first, most tokens first. A hint from unverified files, as `find`.

        Raises:
            LayoutError: `token_ids` does not have this form.
        """
        if spec is not None:
            _require_spec(spec)
        return self._search.why(token_ids, spec, ignore)

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

        Files whose bytes are proven wrong move to quarantine. What the system fails to read proves nothing and is an
        AccessError.

        Args:
            digest: the document, or None for all.
            progress: called with `(done, total)` payload bytes.

        Raises:
            LayoutError: unknown or ambiguous digest.
        """
        holder = Holder()
        if digest is not None:
            digest = self.resolve(digest)
            self._leases.hold(holder, digest)
            return check_documents(self.directory, [digest], progress)
        advice = "manifest: damaged; publish the document again, or delete this file to give it up"
        lost = [Defect(name, path, f"{path}: {advice}") for name, path in self.directory.lost().items()]
        digests = self.directory.digests()
        for name in digests:
            self._leases.hold(holder, name)
        report = check_documents(self.directory, digests, progress)
        return replace(report, defects=(*lost, *report.defects))

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
            try:
                self.directory.move(path, target, touch=True)  # gc counts the grace period from here
            except FileNotFoundError:
                raise RemovedError(f"{path}: file: the document has just been removed") from None
        self.directory.sync(target.parent)
        self.directory.sync(path.parent)
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
        if not isinstance(grace_s, (int, float)) or not 0 <= grace_s < math.inf:
            raise LayoutError(f"grace_s must be at least 0 seconds, got {grace_s!r}")
        return collect(self.directory, grace_s=grace_s, dry_run=dry_run)

    def block_path(self, block_id: str) -> Path:
        """Path of a block's shard."""
        return self.directory.block_path(block_id)

    def manifest_path(self, digest: str) -> Path:
        """Path of a manifest."""
        return self.directory.manifest_path(digest)


def _require_spec(spec: object) -> None:
    if not isinstance(spec, KVSpec):
        raise LayoutError(f"spec must be a KVSpec, got {type(spec).__name__}")
