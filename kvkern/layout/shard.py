"""Shard: one block as a safetensors file: encoded, mapped, verified (see FORMAT.md)."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout.files import DamagedFile, accessing, open_regular
from kvkern.layout.header import (
    ALIGNMENT_BYTES,
    MAX_HEADER_BYTES,
    MAX_SHARD_BYTES,
    MAX_TOKENS,
    Header,
    block_metadata,
    expected_tensors,
    parse_header,
)
from kvkern.layout.mapping import map_file
from kvkern.layout.tiles import BLOCK_TOKENS, TILE_TOKENS, tiles_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvkern.spec import KVSpec

_STEP_BYTES = 1 << 20


_VERIFIED: dict[str, bytes] = {}
"""Block id to xxh3_128 of bytes whose SHA-256 this process has checked."""

_FORMS: dict[tuple[str, str], Header] = {}
"""(Block id, spec digest) to the header of bytes whose form this process has checked."""


@dataclass(frozen=True, eq=False)
class VerifiedBytes:
    """A block's file, mapped, whose bytes are those of its block id; `[size]` uint8."""

    path: Path
    block_id: str
    buffer: np.ndarray


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
    expected = expected_tensors(spec, count)
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
    text = block_metadata(spec.digest, first, count)
    header = json.dumps({"__metadata__": {"kvkern": text}, **expected}, separators=(",", ":"))
    text += " " * (-(8 + len(header)) % ALIGNMENT_BYTES)
    data = safetensors.torch.save(tensors, metadata={"kvkern": text})
    if (8 + int.from_bytes(data[:8], "little")) % ALIGNMENT_BYTES:
        raise LayoutError("this safetensors version writes another header than 0.8; install safetensors 0.8")
    return data


def map_shard(path: Path, block_id: str, spec: KVSpec, *, verify: str = "auto") -> Shard:
    """Map one block and check it, first its bytes, then its form; see `map_verified` and `shard_of`."""
    return shard_of(map_verified(path, block_id, verify=verify), spec)


def map_verified(path: Path, block_id: str, *, verify: str = "auto") -> VerifiedBytes:
    """Map one block and check its bytes.

    The digest is taken over the very mapping that is handed out. The hashes release the GIL: call
    this from a thread pool. No file descriptor stays open.

    Args:
        path: the file.
        block_id: SHA-256 that the bytes must have, 64 hex digits.
        verify: `sha256` reads every byte through SHA-256; `auto` does so the first time in this
            process and compares xxh3_128 of every byte afterwards.

    Raises:
        IntegrityError: the file is missing, or (DamagedFile) its bytes are not those of the block id.
        LayoutError: not a regular file.
        AccessError: the file system refused; the file may be fine.
    """
    return Verification(path, block_id, verify).finish()


class Verification:
    """A block's file, mapped, whose bytes are being checked; one thread may begin and another one finish."""

    def __init__(self, path: Path, block_id: str, verify: str = "auto", limit_bytes: int = MAX_SHARD_BYTES) -> None:
        """Map the file; arguments and errors as in `map_verified`.

        A file that is longer than `limit_bytes`, which its document says, is refused (IntegrityError) and not read.
        """
        if verify not in ("auto", "sha256"):
            raise LayoutError(f"verify must be 'auto' or 'sha256', got {verify!r}")
        self.path, self.block_id, self.buffer = path, block_id, _map(path, block_id, limit_bytes)
        self._known = _VERIFIED.get(block_id) if verify == "auto" else None
        self._sha, self._xxh, self._place = hashlib.sha256(), xxhash.xxh3_128(), 0

    def begin(self) -> None:
        """Do half of the work."""
        if self._known is None:
            self._hash(len(self.buffer) // 2)

    def finish(self) -> VerifiedBytes:
        """Do the rest, and prove that the mapped bytes are the block's, or that they are not."""
        if self._known is None or xxhash.xxh3_128_digest(self.buffer) != self._known:
            self._hash(len(self.buffer))
            _VERIFIED[self.block_id] = self._checked()
        return VerifiedBytes(self.path, self.block_id, self.buffer)

    def _hash(self, end: int) -> None:
        while self._place < end:  # both hashes see a step while it is in the cache
            step = self.buffer[self._place : min(self._place + _STEP_BYTES, end)]
            self._sha.update(step)
            self._xxh.update(step)
            self._place += len(step)

    def _checked(self) -> bytes:
        found = self._sha.hexdigest()
        if found != self.block_id:
            text = f"{self.path}: SHA-256: the bytes have {found}, the name promises {self.block_id}"
            raise DamagedFile(text, self.path, self.block_id, MAX_SHARD_BYTES)
        return self._xxh.digest()


def shard_of(verified: VerifiedBytes, spec: KVSpec) -> Shard:
    """Read a block out of its verified bytes.

    Args:
        verified: the bytes.
        spec: the spec that the block must carry.

    Raises:
        LayoutError: another form than FORMAT.md says.
        SpecMismatchError: the block was published under another spec.
    """
    path, buffer = verified.path, verified.buffer
    known = _FORMS.get((verified.block_id, spec.digest))
    header = known or parse_header(buffer, path, spec)
    views = _tensors(buffer, header)
    if known is None:
        _check_padding(views, header.count, path)
        _FORMS[verified.block_id, spec.digest] = header
    return Shard(verified.block_id, path, header.first, header.count, **views, nbytes=len(buffer))


def read_tokens(path: Path, spec: KVSpec) -> Tensor:
    """Read only the token ids `[count]` int32 of a block, checking its form but NOT its digest.

    Good for a hint that is checked later, such as a search; never for what goes into attention.

    Raises:
        IntegrityError, LayoutError, SpecMismatchError: as `map_shard`, without the digest.
    """
    with _opened(path) as (fd, size), accessing(path, "read"):
        beginning = os.pread(fd, 8 + MAX_HEADER_BYTES + 4 * BLOCK_TOKENS, 0)
    header = parse_header(np.frombuffer(beginning, np.uint8), path, spec, size)
    return torch.frombuffer(bytearray(beginning), dtype=torch.int32, count=header.count, offset=header.payload)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a block's file; yields its descriptor and size."""
    try:
        fd, info = open_regular(path, "a block")
    except FileNotFoundError:
        raise IntegrityError(f"{path}: file: the block is missing; publish its document again") from None
    try:
        yield fd, info.st_size
    finally:
        os.close(fd)


def _map(path: Path, block_id: str, limit_bytes: int) -> np.ndarray:
    with _opened(path) as (fd, size):
        if size < ALIGNMENT_BYTES:
            text = f"{path}: size: {size} bytes, but a block has at least {ALIGNMENT_BYTES}: it is truncated"
            raise DamagedFile(text, path, block_id, MAX_SHARD_BYTES)
        if size > MAX_SHARD_BYTES:
            text = f"{path}: size: {size} bytes are over the limit of {MAX_SHARD_BYTES}"
            raise DamagedFile(text, path, block_id, MAX_SHARD_BYTES)
        if size > limit_bytes:  # that proves nothing about the file: the manifest may be the wrong one
            raise IntegrityError(
                f"{path}: size: {size} bytes, but this block of its document has at most {limit_bytes}: one of them is "
                "wrong. Publish the document again."
            )
        with accessing(path, "map"):
            return map_file(fd, size)


def _tensors(buffer: np.ndarray, header: Header) -> dict[str, Tensor]:
    payload = torch.from_numpy(buffer)[header.payload :]
    dtypes = {"I32": torch.int32, "BF16": torch.bfloat16}
    return {
        name: payload[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.tensors.items()
    }


def _check_padding(views: dict[str, Tensor], count: int, path: Path) -> None:
    ids, rest = views["tokens"].numpy().reshape(-1), count % TILE_TOKENS
    if (ids[:count] < 0).any() or (ids[count:] != -1).any():
        raise LayoutError(f"{path}: tokens: ids >= 0 are required up to count {count}, -1 behind it")
    if not rest:
        return
    tails = {"k": views["k"][-1, ..., rest:], "v": views["v"][-1, :, :, rest:]}
    for name, tail in tails.items():
        if tail.view(torch.int16).numpy().any():
            raise LayoutError(f"{path}: {name}: padding behind token {count} must be +0")
