"""What the store answers: the records that `put`, `ls`, `verify`, `why` and `gc` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from kvkern.spec import KVSpec


@dataclass(frozen=True)
class Published:
    """What `put` did.

    Attributes:
        digest: the document's name, 64 hex digits.
        tokens: tokens of the document.
        blocks_new: blocks written now.
        blocks_reused: blocks that were there already, such as those of a shared beginning.
        payload_bytes: bytes of token ids, K and V over all blocks, new and reused.
    """

    digest: str
    tokens: int
    blocks_new: int
    blocks_reused: int
    payload_bytes: int


@dataclass(frozen=True)
class Summary:
    """One line of `ls`: a document's name, tokens, blocks, payload in bytes, and spec."""

    digest: str
    tokens: int
    blocks: int
    payload_bytes: int
    spec: KVSpec


@dataclass(frozen=True)
class Defect:
    """One finding of `verify`: the document concerned, the file, and what is wrong with it."""

    digest: str
    path: Path
    problem: str


@dataclass(frozen=True)
class Report:
    """What `verify` read (documents, blocks, payload in bytes) and every defect it found."""

    documents: int
    blocks: int
    payload_bytes: int
    defects: tuple[Defect, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.defects


@dataclass(frozen=True)
class Explanation:
    """How far one document serves some tokens, and what stands in the way of more.

    Attributes:
        digest: the document.
        num_tokens: its length.
        matched: leading tokens that are equal to those asked for.
        differences: `(field, in the document, asked for)`: every field of the spec that differs, then the first
            token that does, as `token_ids[i]`. Empty when the document serves all that it can.
    """

    digest: str
    num_tokens: int
    matched: int
    differences: tuple[tuple[str, Any, Any], ...]

    @property
    def is_usable(self) -> bool:
        """Whether a reader may attend to the matched tokens: there are some, and no field of the spec differs."""
        return self.matched > 0 and all(name.startswith("token_ids[") for name, _, _ in self.differences)

    @property
    def reason(self) -> str:
        """What differs, in words."""
        if not self.differences:
            return "nothing"
        return "; ".join(f"{name}: {stored!r}, {wanted!r}" for name, stored, wanted in self.differences)


@dataclass(frozen=True)
class Collected:
    """What `gc` did, or would do.

    Attributes:
        dry_run: whether nothing was done.
        documents: published documents.
        removed_but_held: removed documents that a reader still holds.
        blocks_needed: blocks of those, and of documents removed within the grace period.
        blocks_condemned: blocks that nothing needs, set aside now.
        blocks_restored: blocks set aside earlier that a document needs again.
        blocks_deleted: blocks set aside earlier, deleted now.
        others_deleted: temporary files, index files, leases and manifests of the dead, deleted now.
        bytes_freed: bytes of the deleted blocks.
    """

    dry_run: bool
    documents: int
    removed_but_held: int
    blocks_needed: int
    blocks_condemned: int
    blocks_restored: int
    blocks_deleted: int
    others_deleted: int
    bytes_freed: int
