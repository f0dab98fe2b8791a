"""The header of a shard: what it must say for a block of a spec, and the strict reading of it (see FORMAT.md)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from kvkern.errors import LayoutError, SpecMismatchError
from kvkern.layout.tiles import BLOCK_TOKENS, TILE_TOKENS, tiles_for
from kvkern.spec import KVSpec, canonical_json, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

FORMAT = "kvkern-block-v1"
ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 65536
MAX_PAYLOAD_BYTES = 1 << 32
MAX_SHARD_BYTES = 8 + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES
MAX_TOKENS = 1 << 31


@dataclass(frozen=True)
class Header:
    """What the header of a shard says, all of it checked.

    Attributes:
        first: position of the first token in the document.
        count: tokens, 1 to 256.
        payload: offset of the payload in the file, in bytes.
        tensors: name to dtype, shape and data_offsets, in file order.
    """

    first: int
    count: int
    payload: int
    tensors: dict[str, dict[str, Any]]


def payload_bytes(spec: KVSpec, count: int) -> int:
    """Bytes of ids, K and V behind the header of a shard of `count` tokens, padding included."""
    return tiles_for(count) * TILE_TOKENS * (4 + spec.bytes_per_token)


def max_shard_bytes(spec: KVSpec, count: int) -> int:
    """Size that no shard of `count` tokens of a spec is over, in bytes; only the header's length is free."""
    return 8 + MAX_HEADER_BYTES + payload_bytes(spec, count)


def block_metadata(spec_digest: str, first: int, count: int) -> str:
    """Text of the one metadata key, without the spaces that align the payload."""
    obj = {"count": count, "first": first, "format": FORMAT, "spec": spec_digest}
    return canonical_json(obj).decode("ascii")


@functools.lru_cache(maxsize=1024)
def expected_tensors(spec: KVSpec, count: int) -> dict[str, dict[str, Any]]:
    """Header entries of a block, in file order; shared, never to be changed."""
    tiles, layers, heads, dim = tiles_for(count), spec.num_layers, spec.num_kv_heads, spec.head_dim
    ids_end = 4 * TILE_TOKENS * tiles
    k_end = ids_end + tiles * TILE_TOKENS * spec.bytes_per_token // 2
    v_end = payload_bytes(spec, count)
    return {
        "tokens": {"dtype": "I32", "shape": [tiles, TILE_TOKENS], "data_offsets": [0, ids_end]},
        "k": {
            "dtype": "BF16",
            "shape": [tiles, layers, heads, dim, TILE_TOKENS],
            "data_offsets": [ids_end, k_end],
        },
        "v": {
            "dtype": "BF16",
            "shape": [tiles, layers, heads, TILE_TOKENS, dim],
            "data_offsets": [k_end, v_end],
        },
    }


def parse_header(buffer: np.ndarray, path: Path, spec: KVSpec, size: int | None = None) -> Header:
    """Read the header of a shard, accepting nothing that FORMAT.md does not allow.

    Args:
        buffer: uint8, the file's beginning: header and all, at least 8 bytes.
        path: its name, for messages.
        spec: the spec that the block must carry.
        size: of the whole file in bytes; that of the buffer when None.

    Raises:
        LayoutError: another form than FORMAT.md says; the message names the file and the field.
        SpecMismatchError: the block was published under another spec.
    """

    def bad(field: str, given: Any, allowed: Any) -> NoReturn:
        raise LayoutError(f"{path}: {field}: got {given!r}, FORMAT.md requires {allowed}")

    length = int.from_bytes(buffer[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(buffer):
        bad("header length", length, f"at most {MAX_HEADER_BYTES} and inside the file")
    if (8 + length) % ALIGNMENT_BYTES:
        bad("payload offset", 8 + length, f"a multiple of {ALIGNMENT_BYTES}")
    raw = buffer[8 : 8 + length].tobytes()
    if raw[:1] != b"{":
        bad("header", raw[:1], "a first byte '{'")
    header = parse_json(raw, f"{path}: header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != ["kvkern"]:
        bad("__metadata__", metadata, "exactly one key, 'kvkern'")
    text = metadata["kvkern"]
    if not isinstance(text, str):
        bad("__metadata__.kvkern", text, "a string")
    meta = parse_json(text.encode("utf-8", "replace"), f"{path}: __metadata__.kvkern")
    if list(meta) != ["count", "first", "format", "spec"]:
        bad("__metadata__.kvkern", list(meta), "the keys count, first, format, spec in this order")
    first, count = meta["first"], meta["count"]
    if meta["format"] != FORMAT:
        bad("format", meta["format"], f"{FORMAT!r}; a newer file needs a newer kvkern")
    if meta["spec"] != spec.digest:
        error = SpecMismatchError("digest", meta["spec"], spec.digest)
        error.args = (f"{path}: {error}",)
        raise error
    if type(count) is not int or not 1 <= count <= BLOCK_TOKENS:
        bad("count", count, f"an integer from 1 to {BLOCK_TOKENS}")
    if type(first) is not int or not 0 <= first < MAX_TOKENS or first % BLOCK_TOKENS:
        bad("first", first, f"a multiple of {BLOCK_TOKENS} under {MAX_TOKENS}")
    if text.rstrip(" ") != block_metadata(spec.digest, first, count):
        bad("__metadata__.kvkern", text.rstrip(" "), "canonical JSON, then spaces")
    expected = expected_tensors(spec, count)
    if set(header) != set(expected):
        bad("tensors", sorted(header), f"exactly {sorted(expected)}")
    for name, entry in expected.items():
        if not _same(header[name], entry):
            bad(name, header[name], entry)
    if payload_bytes(spec, count) > MAX_PAYLOAD_BYTES:
        bad("payload", payload_bytes(spec, count), f"at most {MAX_PAYLOAD_BYTES} bytes")
    end = 8 + length + payload_bytes(spec, count)
    size = len(buffer) if size is None else size
    if end != size:
        bad("file size", size, f"{end} bytes")
    return Header(first, count, 8 + length, expected)


def _same(found: Any, expected: Any) -> bool:
    """Compare as JSON does: 1, 1.0 and true are three values."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return found == expected
