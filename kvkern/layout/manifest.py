"""Manifest: the canonical JSON that names a document: its spec, its token count, its block ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout.header import MAX_TOKENS, payload_bytes
from kvkern.layout.tiles import BLOCK_TOKENS, blocks_for
from kvkern.spec import KVSpec, canonical_json, is_digest, parse_json

FORMAT = "kvkern-manifest-v1"
MAX_MANIFEST_BYTES = 1 << 22
_KEYS = {"blocks", "format", "num_tokens", "spec"}


@dataclass(frozen=True)
class Manifest:
    """A published document, without any mention of place, time or host.

    Attributes:
        spec: what made the KV.
        num_tokens: tokens of the document, at least 1.
        blocks: block ids in order, one per 256 tokens begun.

    Raises:
        LayoutError: a field is out of range; the message names it.
    """

    spec: KVSpec
    num_tokens: int
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the counts agree and the ids are ids."""
        if type(self.num_tokens) is not int or not 1 <= self.num_tokens < MAX_TOKENS:
            raise LayoutError(f"manifest field 'num_tokens': got {self.num_tokens!r}, allowed is 1 to 2^31-1")
        want = blocks_for(self.num_tokens)
        if len(self.blocks) != want:
            raise LayoutError(
                f"manifest field 'blocks': got {len(self.blocks)} ids, {self.num_tokens} tokens take {want}"
            )
        for i, block_id in enumerate(self.blocks):
            if not is_digest(block_id):
                raise LayoutError(f"manifest field 'blocks[{i}]': {block_id!r} is not 64 lower-case hex digits")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_bytes()`, 64 hex digits: the document's name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def payload_bytes(self) -> int:
        """Bytes of token ids, K and V over all blocks, padding included, headers not."""
        return sum(payload_bytes(self.spec, self.count(i)) for i in range(len(self.blocks)))

    def count(self, i: int) -> int:
        """Tokens in block `i`: 256, or fewer in the last."""
        return min(BLOCK_TOKENS, self.num_tokens - i * BLOCK_TOKENS)

    def to_bytes(self) -> bytes:
        """Encode as canonical JSON."""
        return canonical_json(
            {
                "blocks": list(self.blocks),
                "format": FORMAT,
                "num_tokens": self.num_tokens,
                "spec": self.spec.to_json(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, expected_digest: str) -> Manifest:
        """Decode a manifest and check that it is the one asked for.

        Args:
            data: the file's bytes.
            expected_digest: SHA-256 that they must have, 64 hex digits.

        Raises:
            IntegrityError: the bytes have another digest.
            LayoutError: they have another form than FORMAT.md says; the message names the field.
        """
        name = f"manifest {expected_digest}.json"
        if len(data) > MAX_MANIFEST_BYTES:
            raise LayoutError(f"{name}: {len(data)} bytes are over the limit of {MAX_MANIFEST_BYTES}")
        found = hashlib.sha256(data).hexdigest()
        if found != expected_digest:
            raise IntegrityError(f"{name}: SHA-256 is {found}. Publish the document again or copy the file.")
        obj = parse_json(data, name)
        if set(obj) != _KEYS:
            raise LayoutError(f"{name}: fields are {sorted(obj)}, FORMAT.md requires {sorted(_KEYS)}")
        if obj["format"] != FORMAT:
            raise LayoutError(f"{name}: format is {obj['format']!r}, this kvkern reads {FORMAT!r}")
        if not isinstance(obj["blocks"], list):
            raise LayoutError(f"{name}: field 'blocks' must be a list")
        manifest = cls(KVSpec.from_json(obj["spec"]), obj["num_tokens"], tuple(obj["blocks"]))
        if manifest.to_bytes() != data:
            raise LayoutError(f"{name}: not canonical JSON (sorted keys, no spaces, ASCII, shortest numbers)")
        return manifest
