"""BlockStore: a directory of write-once documents, published atomically, verified on reading."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvkern.errors import IntegrityError, KvkernError, LayoutError
from kvkern.layout.files import TEMPORARY, holds, sync_directory, write_atomically
from kvkern.layout.index import chain_keys, decode_index, encode_index, matched_tokens, token_tensor
from kvkern.layout.manifest import MAX_MANIFEST_BYTES, Manifest
from kvkern.layout.pool import Document
from kvkern.layout.records import Defect, Published, Report, Summary
from kvkern.layout.shard import encode_shard, map_shard, payload_bytes, read_tokens
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, pack, require_finite_kv
from kvkern.spec import is_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from kvkern.layout.shard import Shard
    from kvkern.spec import KVSpec

FORMAT = "kvkern-store-v1"
Progress = Callable[[int, int], None]
_FOLDERS = ("blocks", "manifests", "index")
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


class BlockStore:
    """Documents in a directory; any number of processes may publish and read at once.

    Args:
        root: the directory, created when missing.

    Raises:
        LayoutError: `root` holds other files, or a store of another format.

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
        """Open the store, creating what is missing."""
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        marker = self.root / "format"
        if not marker.exists():
            names = {p.name for p in self.root.iterdir() if not p.name.startswith(TEMPORARY)}
            if names - {"format", *_FOLDERS}:
                raise LayoutError(f"{self.root}: not a kvkern store; give a new or an empty directory")
            write_atomically(marker, FORMAT.encode())
        found = marker.read_text(errors="replace").strip()
        if found != FORMAT:
            raise LayoutError(
                f"{marker}: format is {found[:64]!r}, this kvkern reads {FORMAT!r}. "
                "Use the kvkern that wrote the store, or another directory."
            )
        for name in _FOLDERS:
            (self.root / name).mkdir(exist_ok=True)
        sync_directory(self.root)

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
            OSError: the file system refused; nothing is visible then, and `put` may be repeated.
        """
        ids = token_tensor(token_ids)
        for name, tensor in (("k", k), ("v", v)):
            require_finite_kv(name, tensor, (spec.num_layers, spec.num_kv_heads, ids.numel(), spec.head_dim))
        k_tiles, v_tiles = pack(k, v)

        def publish_block(i: int) -> tuple[str, bool]:
            tiles = slice(BLOCK_TILES * i, BLOCK_TILES * (i + 1))
            tokens = ids[BLOCK_TOKENS * i : BLOCK_TOKENS * (i + 1)]
            data = encode_shard(spec, BLOCK_TOKENS * i, tokens, k_tiles[tiles], v_tiles[tiles])
            block_id = hashlib.sha256(data).hexdigest()
            path = self.block_path(block_id)
            if holds(path, data):
                return block_id, False
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data)
            return block_id, True

        counts = [min(BLOCK_TOKENS, ids.numel() - i) for i in range(0, ids.numel(), BLOCK_TOKENS)]
        sizes = [payload_bytes(spec, count) for count in counts]
        done = _in_threads(publish_block, range(len(sizes)), sizes, progress)
        manifest = Manifest(spec, ids.numel(), tuple(block_id for block_id, _ in done))
        # Reused blocks too: another process may have renamed them and not yet made that durable.
        for folder in {self.block_path(block_id).parent for block_id in manifest.blocks}:
            sync_directory(folder)
        sync_directory(self.root / "blocks")
        write_atomically(self.manifest_path(manifest.digest), manifest.to_bytes())
        sync_directory(self.root / "manifests")
        self._write_index(manifest, chain_keys(spec.digest, ids))
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
        manifest = self.manifest(digest)
        shards = _in_threads(
            lambda i: self._shard(manifest, i, verify),
            range(len(manifest.blocks)),
            [payload_bytes(manifest.spec, manifest.count(i)) for i in range(len(manifest.blocks))],
            progress,
        )
        return Document(manifest, tuple(shards))

    def manifest(self, digest: str) -> Manifest:
        """Read one manifest by its digest or a unique beginning of it.

        Raises:
            IntegrityError: the file's bytes are damaged.
            LayoutError: unknown or ambiguous digest, or a file of another form.
        """
        full = self.resolve(digest)
        path = self.manifest_path(full)
        with path.open("rb") as file:
            return Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1), full)

    def resolve(self, prefix: str) -> str:
        """Complete the beginning of a digest.

        Args:
            prefix: 8 to 64 lower-case hex digits.

        Raises:
            LayoutError: too short, unknown, or the beginning of several documents' names.
        """
        if not isinstance(prefix, str) or not re.fullmatch(r"[0-9a-f]{8,64}", prefix):
            raise LayoutError(f"digest: got {prefix!r}, allowed are 8 to 64 lower-case hex digits")
        if len(prefix) == 64 and self.manifest_path(prefix).is_file():
            return prefix
        known = self._digests()
        found = [digest for digest in known if digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise LayoutError(f"digest {prefix} is ambiguous: {', '.join(found[:4])}. Give more digits.")
        near = sorted(known, key=lambda d: -len(os.path.commonprefix([d, prefix])))[:4]
        listing = f"nearby are {', '.join(near)}" if near else "the store is empty"
        raise LayoutError(f"digest {prefix} is not in {self.root}: {listing}")

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
        query = token_tensor(token_ids)
        query_keys = chain_keys(spec_digest, query)
        found = []
        for digest in self._digests():
            try:
                manifest = self.manifest(digest)
                if manifest.spec.digest != spec_digest:
                    continue
                keys = self._keys(manifest)
                stored = partial(self._tokens, manifest)
                shared = matched_tokens(query, query_keys, keys, stored)
            except (KvkernError, OSError) as error:
                warnings.warn(f"document {digest} is left out of the search: {error}", stacklevel=2)
                continue
            if shared:
                found.append((digest, shared))
        return sorted(found, key=lambda item: (-item[1], item[0]))

    def ls(self) -> list[Summary]:
        """List the documents by digest; a damaged manifest is left out with a warning."""
        lines = []
        for digest in self._digests():
            try:
                m = self.manifest(digest)
            except (KvkernError, OSError) as error:
                warnings.warn(f"left out of the list: {error}", stacklevel=2)
                continue
            lines.append(Summary(digest, m.num_tokens, len(m.blocks), m.payload_bytes, m.spec))
        return lines

    def verify(self, digest: str | None = None, progress: Progress | None = None) -> Report:
        """Read every byte of one document, or of all, through SHA-256 and collect all defects.

        Args:
            digest: the document, or None for all.
            progress: called with `(done, total)` payload bytes.

        Raises:
            LayoutError: unknown or ambiguous digest.
        """
        defects: list[Defect] = []
        manifests: list[Manifest] = []
        for name in self._digests() if digest is None else [self.resolve(digest)]:
            try:
                manifests.append(self.manifest(name))
            except (KvkernError, OSError) as error:
                defects.append(Defect(name, self.manifest_path(name), str(error)))
        jobs = [(manifest, i) for manifest in manifests for i in range(len(manifest.blocks))]

        def check(job: tuple[Manifest, int]) -> Defect | None:
            manifest, i = job
            try:
                self._shard(manifest, i, "sha256")
            except (KvkernError, OSError) as error:
                return Defect(manifest.digest, self.block_path(manifest.blocks[i]), str(error))
            return None

        sizes = [payload_bytes(manifest.spec, manifest.count(i)) for manifest, i in jobs]
        defects += [defect for defect in _in_threads(check, jobs, sizes, progress) if defect]
        return Report(len(manifests), len(jobs), sum(sizes), tuple(defects))

    def block_path(self, block_id: str) -> Path:
        """Path of a block's shard."""
        return self.root / "blocks" / block_id[:2] / f"{block_id}.safetensors"

    def manifest_path(self, digest: str) -> Path:
        """Path of a manifest."""
        return self.root / "manifests" / f"{digest}.json"

    def _digests(self) -> list[str]:
        names = (p.name.removesuffix(".json") for p in (self.root / "manifests").glob("*.json"))
        return sorted(filter(is_digest, names))

    def _shard(self, manifest: Manifest, i: int, verify: str) -> Shard:
        block_id = manifest.blocks[i]
        shard = map_shard(self.block_path(block_id), block_id, manifest.spec, verify=verify)
        if (shard.first, shard.count) != (BLOCK_TOKENS * i, manifest.count(i)):
            raise IntegrityError(
                f"{shard.path}: block {i} of document {manifest.digest} must have first "
                f"{BLOCK_TOKENS * i} and count {manifest.count(i)}, but has {shard.first} and "
                f"{shard.count}. The manifest is wrong: publish the document again."
            )
        return shard

    def _tokens(self, manifest: Manifest, i: int) -> Tensor:
        return read_tokens(self.block_path(manifest.blocks[i]), manifest.spec)

    def _keys(self, manifest: Manifest) -> tuple[str, ...]:
        path = self._index_path(manifest)
        try:
            return decode_index(path.read_bytes(), manifest.digest, len(manifest.blocks))
        except (LayoutError, OSError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            warnings.warn(f"{path} {why}; rebuilding it from the manifest and its blocks", stacklevel=3)
        keys = chain_keys(manifest.spec.digest, self.get(manifest.digest).token_ids())
        self._write_index(manifest, keys)
        return keys

    def _index_path(self, manifest: Manifest) -> Path:
        return self.root / "index" / f"{manifest.digest}.json"

    def _write_index(self, manifest: Manifest, keys: Sequence[str]) -> None:
        path = self._index_path(manifest)
        try:
            write_atomically(path, encode_index(manifest.digest, keys))
        except OSError as error:  # the document itself is published and safe
            warnings.warn(f"{path} could not be written ({error}); searches rebuild it", stacklevel=3)


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
