"""Search: which documents begin like some tokens, and why the others do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kvkern.errors import KvkernError, LayoutError
from kvkern.layout.files import read_regular
from kvkern.layout.index import chain_keys, decode_index, encode_index, matched_tokens, token_tensor
from kvkern.layout.leases import Holder
from kvkern.layout.pool import Document
from kvkern.layout.reading import map_blocks, read_manifest, require_distinct_blocks
from kvkern.layout.records import Explanation
from kvkern.layout.shard import read_tokens
from kvkern.layout.tiles import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from kvkern.layout.directory import Directory
    from kvkern.layout.leases import Leases
    from kvkern.layout.manifest import Manifest
    from kvkern.spec import KVSpec


_INDEX_BYTES, _INDEX_BYTES_PER_BLOCK = 512, 80


class Search:
    """The index of a store, kept in memory once read; published files never change.

    Args:
        directory: the store.
        leases: hold a document while its index is rebuilt.
    """

    def __init__(self, directory: Directory, leases: Leases) -> None:
        """Read nothing yet."""
        self._directory, self._leases = directory, leases
        self._entries: dict[str, _Entry] = {}

    def find(self, spec_digest: str, token_ids: Tensor | Sequence[int]) -> list[tuple[str, int]]:
        """Find documents of one spec that begin like the given tokens; see `BlockStore.find`."""
        query = token_tensor(token_ids)
        query_keys = chain_keys(spec_digest, query)
        found = []
        for entry in self._all():
            if entry.manifest.spec.digest == spec_digest:
                shared, _ = self._matched(entry, query, query_keys)
                if shared:
                    found.append((entry.manifest.digest, shared))
        return sorted(found, key=lambda item: (-item[1], item[0]))

    def why(self, token_ids: Tensor | Sequence[int], spec: KVSpec | None, ignore: tuple[str, ...]) -> list[Explanation]:
        """Explain for every document how far it serves; see `BlockStore.why`."""
        query = token_tensor(token_ids)
        keys: dict[str, tuple[str, ...]] = {}
        found = []
        for entry in self._all():
            stored = entry.manifest.spec
            if stored.digest not in keys:
                keys[stored.digest] = chain_keys(stored.digest, query)
            matched, problem = self._matched(entry, query, keys[stored.digest])
            differences = [] if spec is None else list(stored.differences(spec, ignore=ignore))
            if problem:
                differences.append(("file", problem, "a readable block"))
            elif matched < min(query.numel(), entry.manifest.num_tokens):
                differences.append((f"token_ids[{matched}]", entry.token(matched), int(query[matched])))
            found.append(Explanation(entry.manifest.digest, entry.manifest.num_tokens, matched, tuple(differences)))
        return sorted(found, key=lambda item: (not item.is_usable, -item.matched, item.digest))

    def write(self, manifest: Manifest, keys: Sequence[str]) -> None:
        """Write a document's index file; a failure is a warning, because searches rebuild it."""
        path = self._directory.index_path(manifest.digest)
        try:
            self._directory.write(path, encode_index(manifest.digest, keys))
        except LayoutError as error:  # the document itself is published and safe
            warnings.warn(f"{path} could not be written ({error}); searches rebuild it", stacklevel=3)

    def _all(self) -> Iterator[_Entry]:
        for digest in self._directory.digests():
            try:
                yield self._entry(digest)
            except KvkernError as error:
                warnings.warn(f"document {digest} is left out of the search: {error}", stacklevel=4)

    def _entry(self, digest: str) -> _Entry:
        if digest not in self._entries:
            manifest = read_manifest(self._directory, digest)
            require_distinct_blocks(self._directory, manifest)
            self._entries[digest] = _Entry(self._directory, manifest, self._keys(manifest))
        return self._entries[digest]

    def _matched(self, entry: _Entry, query: Tensor, query_keys: Sequence[str]) -> tuple[int, str]:
        """Count shared leading tokens; the tokens of a block that cannot be read do not count, and say why."""
        try:
            return matched_tokens(query, query_keys, entry.keys, entry.tokens), ""
        except KvkernError as error:
            warnings.warn(f"document {entry.manifest.digest}: its last tokens are left out: {error}", stacklevel=4)
            return matched_tokens(query, query_keys, entry.keys, lambda i: query[:0]), str(error)

    def _keys(self, manifest: Manifest) -> tuple[str, ...]:
        path = self._directory.index_path(manifest.digest)
        try:
            limit = _INDEX_BYTES_PER_BLOCK * len(manifest.blocks) + _INDEX_BYTES
            data = read_regular(path, "an index file", limit)
            return decode_index(data, manifest.digest, len(manifest.blocks))
        except (LayoutError, FileNotFoundError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            warnings.warn(f"{path} {why}; rebuilding it from the manifest and its blocks", stacklevel=5)
        holder = Holder()
        self._leases.hold(holder, manifest.digest)
        document = Document(manifest, tuple(map_blocks(self._directory, manifest, "auto", None)), holder)
        keys = chain_keys(manifest.spec.digest, document.token_ids())
        self.write(manifest, keys)
        return keys


@dataclass
class _Entry:
    """One document as the search knows it."""

    directory: Directory
    manifest: Manifest
    keys: tuple[str, ...]

    def token(self, position: int) -> int:
        """Return one token id; unverified."""
        return int(self.tokens(position // BLOCK_TOKENS)[position % BLOCK_TOKENS])

    @cached_property
    def _tokens(self) -> dict[int, Tensor]:
        return {}

    def tokens(self, i: int) -> Tensor:
        """Return the token ids of block i; unverified."""
        if i not in self._tokens:
            self._tokens[i] = read_tokens(self.directory.block_path(self.manifest.blocks[i]), self.manifest.spec)
        return self._tokens[i]
