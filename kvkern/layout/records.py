"""What the store answers: the records that `put`, `ls` and `verify` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
