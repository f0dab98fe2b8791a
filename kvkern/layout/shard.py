"""Shard: one block as a safetensors file: encoded, mapped, verified, parsed (see FORMAT.md)."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from kvkern.errors import IntegrityError, LayoutError, SpecMismatchError
from kvkern.layout.tiles import BLOCK_TOKENS, TILE_TOKENS, tiles_for
from kvkern.spec import KVSpec, canonical_json, parse_json

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "kvkern-block-v1"
ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 65536
MAX_SHARD_BYTES = 1 << 32
MAX_TOKENS = 1 << 31
_STEP_BYTES = 1 << 20

# block id -> xxh3_128 of bytes whose SHA-256 this process has checked
_VERIFIED: dict[str, bytes] = {}


@dataclass(frozen=True, eq=False)
class Shard:
    """One verified block, mapped read-only; its tensors keep the mapping alive; never write them.

    Attributes:
        block_id: SHA-256 of the file, 64 hex digits.
        path: the file.
        first: position of the first token in the document.
        count: tokens, 1 to 256.
        tokens: `[tiles, 64]` int32 token ids, -1 past the last token.
        k: `[tiles, layers, kv_heads, head_dim, 64]` bf16.
        v: `[tiles, layers, kv_heads, 64, head_dim]` bf16.
        nbytes: size of the file in bytes.
    """

    block_id: str
    path: Path
    first: int
    count: int
    tokens: Tensor
    k: Tensor
    v: Tensor
    nbytes: int


def payload_bytes(spec: KVSpec, count: int) -> int:
    """Bytes of ids, K and V behind the header of a shard of `count` tokens, padding included."""
    return tiles_for(count) * TILE_TOKENS * (4 + spec.bytes_per_token)


def encode_shard(spec: KVSpec, first: int, token_ids: Tensor, k: Tensor, v: Tensor) -> bytes:
    """Encode one block; the same arguments give the same bytes in any process.

    Args:
        spec: the spec of the document.
        first: position of the first token in the document, a multiple of 256.
        token_ids: `[count]` integers, 1 to 256 of them.
        k: `[tiles, layers, kv_heads, head_dim, 64]` bf16, as `pack` makes it.
        v: `[tiles, layers, kv_heads, 64, head_dim]` bf16.

    Returns:
        The file's bytes; their SHA-256 is the block id.

    Raises:
        LayoutError: an argument does not have this form; the message names it.
    """
    count = token_ids.numel()
    if token_ids.dim() != 1 or not 1 <= count <= BLOCK_TOKENS:
        raise LayoutError(f"token_ids must be [1..{BLOCK_TOKENS}], got {tuple(token_ids.shape)}")
    if not 0 <= first < MAX_TOKENS or first % BLOCK_TOKENS:
        raise LayoutError(f"first must be a multiple of {BLOCK_TOKENS}, got {first}")
    tokens = torch.full((tiles_for(count), TILE_TOKENS), -1, dtype=torch.int32)
    tokens.view(-1)[:count] = token_ids
    expected = _expected_tensors(spec, count)
    k, v = k.detach().cpu().contiguous(), v.detach().cpu().contiguous()
    if k.data_ptr() == v.data_ptr():
        v = v.clone()  # the stock writer refuses tensors that share memory
    tensors = {"tokens": tokens, "k": k, "v": v}
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]["shape"]:
            want = expected[name]["shape"]
            raise LayoutError(f"{name} must be {want} for {count} tokens, got {list(tensor.shape)}")
        if name != "tokens" and tensor.dtype != torch.bfloat16:
            raise LayoutError(f"{name} must be torch.bfloat16, got {tensor.dtype}")
    text = _metadata(spec.digest, first, count)
    header = json.dumps({"__metadata__": {"kvkern": text}, **expected}, separators=(",", ":"))
    text += " " * (-(8 + len(header)) % ALIGNMENT_BYTES)
    data = safetensors.torch.save(tensors, metadata={"kvkern": text})
    if (8 + int.from_bytes(data[:8], "little")) % ALIGNMENT_BYTES:
        raise LayoutError("this safetensors version writes another header than 0.8; install safetensors 0.8")
    return data


def map_shard(path: Path, block_id: str, spec: KVSpec, *, verify: str = "auto") -> Shard:
    """Map one block and check it, first its bytes, then its form.

    The digest is taken over the very mapping that is handed out. The hashes release the GIL: call
    this from a thread pool. Each mapping holds one file descriptor.

    Args:
        path: the file.
        block_id: SHA-256 that the bytes must have, 64 hex digits.
        spec: the spec that the block must carry.
        verify: `sha256` reads every byte through SHA-256; `auto` does so the first time in this
            process and compares xxh3_128 of every byte afterwards.

    Raises:
        IntegrityError: the file is missing or its bytes are not those of the block id.
        LayoutError: not a regular file, too large, or of another form than FORMAT.md says.
        SpecMismatchError: the block was published under another spec.
    """
    if verify not in ("auto", "sha256"):
        raise LayoutError(f"verify must be 'auto' or 'sha256', got {verify!r}")
    buffer = _view_of(_map(path))
    _check_digest(buffer, path, block_id, fast=verify == "auto")
    form = _parse_header(buffer, path, spec)
    first, count, views = form["first"], form["count"], _tensors(buffer, form)
    _check_padding(views, count, path)
    return Shard(block_id, path, first, count, **views, nbytes=len(buffer))


def read_tokens(path: Path, spec: KVSpec) -> Tensor:
    """Read only the token ids `[count]` int32 of a block, checking its form but NOT its digest.

    Good for a hint that is checked later, such as a search; never for what goes into attention.

    Raises:
        IntegrityError, LayoutError, SpecMismatchError: as `map_shard`, without the digest.
    """
    buffer = _view_of(_map(path, populate=False))
    form = _parse_header(buffer, path, spec)
    return _tensors(buffer, form)["tokens"].reshape(-1)[: form["count"]].clone()


class _ReadOnlyPages:
    """Lends a mapping to numpy without the read-only flag, of which torch warns at every tensor.

    A warnings filter would do the same, but is not safe in a thread pool. A write still faults.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        readable = np.frombuffer(mapping, dtype=np.uint8)
        self.keep_alive = readable
        self.__array_interface__ = dict(readable.__array_interface__)
        self.__array_interface__["data"] = (readable.ctypes.data, False)


def _view_of(mapping: mmap.mmap) -> np.ndarray:
    return np.asarray(_ReadOnlyPages(mapping))


def _map(path: Path, *, populate: bool = True) -> mmap.mmap:
    try:
        # O_NONBLOCK: a FIFO in the place of a block must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: the block is missing; publish its document again") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise LayoutError(f"{path}: a block must be a regular file, not a link") from None
        raise
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise LayoutError(f"{path}: a block must be a regular file")
        if info.st_size > MAX_SHARD_BYTES:
            raise LayoutError(f"{path}: size {info.st_size} is over the limit of {MAX_SHARD_BYTES} bytes")
        if info.st_size < ALIGNMENT_BYTES:
            raise IntegrityError(
                f"{path}: truncated to {info.st_size} bytes, a block has at least "
                f"{ALIGNMENT_BYTES}; publish its document again"
            )
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if populate else 0)
        return mmap.mmap(fd, info.st_size, prot=mmap.PROT_READ, flags=flags)
    finally:
        os.close(fd)


def _check_digest(buffer: np.ndarray, path: Path, block_id: str, *, fast: bool) -> None:
    known = _VERIFIED.get(block_id) if fast else None
    if known is not None:
        if xxhash.xxh3_128_digest(buffer) == known:
            return
        given = "xxh3_128 is not the one verified earlier in this process"
    else:
        sha, xxh = hashlib.sha256(), xxhash.xxh3_128()
        for start in range(0, len(buffer), _STEP_BYTES):  # both hashes see a step while it is in the cache
            step = buffer[start : start + _STEP_BYTES]
            sha.update(step)
            xxh.update(step)
        if sha.hexdigest() == block_id:
            _VERIFIED[block_id] = xxh.digest()
            return
        given = f"SHA-256 is {sha.hexdigest()}"
    raise IntegrityError(
        f"{path}: these are not the bytes of block {block_id}: {given}. Publish its document "
        "again, which replaces damaged blocks, or copy the file from another store."
    )


def _metadata(spec_digest: str, first: int, count: int) -> str:
    obj = {"count": count, "first": first, "format": FORMAT, "spec": spec_digest}
    return canonical_json(obj).decode("ascii")


def _expected_tensors(spec: KVSpec, count: int) -> dict[str, dict[str, Any]]:
    """Header entries of a block, in file order."""
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


def _parse_header(buffer: np.ndarray, path: Path, spec: KVSpec) -> dict[str, Any]:
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
    if text.rstrip(" ") != _metadata(spec.digest, first, count):
        bad("__metadata__.kvkern", text.rstrip(" "), "canonical JSON, then spaces")
    expected = _expected_tensors(spec, count)
    if set(header) != set(expected):
        bad("tensors", sorted(header), f"exactly {sorted(expected)}")
    for name, entry in expected.items():
        if canonical_json(header[name]) != canonical_json(entry):
            bad(name, header[name], entry)
    end = 8 + length + payload_bytes(spec, count)
    if end != len(buffer):
        bad("file size", len(buffer), f"{end} bytes")
    return {"first": first, "count": count, "start": 8 + length, "tensors": expected}


def _tensors(buffer: np.ndarray, form: dict[str, Any]) -> dict[str, Tensor]:
    payload = torch.from_numpy(buffer)[form["start"] :]
    dtypes = {"I32": torch.int32, "BF16": torch.bfloat16}
    return {
        name: payload[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]]).view(entry["shape"])
        for name, entry in form["tensors"].items()
    }


def _check_padding(views: dict[str, Tensor], count: int, path: Path) -> None:
    ids, rest = views["tokens"].reshape(-1), count % TILE_TOKENS
    if bool((ids[:count] < 0).any()) or bool((ids[count:] != -1).any()):
        raise LayoutError(f"{path}: tokens: ids >= 0 are required up to count {count}, -1 behind it")
    if not rest:
        return
    tails = {"k": views["k"][-1, ..., rest:], "v": views["v"][-1, :, :, rest:]}
    for name, tail in tails.items():
        if bool(tail.view(torch.int16).any()):
            raise LayoutError(f"{path}: {name}: padding behind token {count} must be +0")
