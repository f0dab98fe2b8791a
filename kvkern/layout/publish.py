"""Publish: a document becomes visible in one step, after its blocks are whole, durable and in place."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from kvkern.errors import LayoutError
from kvkern.layout.files import DamagedFile, holds
from kvkern.layout.header import MAX_PAYLOAD_BYTES, payload_bytes
from kvkern.layout.manifest import MAX_MANIFEST_BYTES, Manifest
from kvkern.layout.parallel import in_parallel
from kvkern.layout.reading import MAX_TABLE_BYTES
from kvkern.layout.records import Published
from kvkern.layout.shard import encode_shard
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, blocks_for, pack, require_finite_kv

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from kvkern.layout.directory import Directory
    from kvkern.layout.parallel import Progress
    from kvkern.spec import KVSpec


def publish(
    directory: Directory, spec: KVSpec, ids: Tensor, k: Tensor, v: Tensor, progress: Progress | None
) -> tuple[Published, Manifest]:
    """Write the blocks that are missing, then the manifest; see `BlockStore.put`."""
    for name, tensor in (("k", k), ("v", v)):
        require_finite_kv(name, tensor, (spec.num_layers, spec.num_kv_heads, ids.numel(), spec.head_dim))
    _require_readable(spec, ids.numel())
    directory.require_real_folders()
    k_tiles, v_tiles = pack(k, v)

    def encoded(i: int) -> bytes:
        tiles = slice(BLOCK_TILES * i, BLOCK_TILES * (i + 1))
        tokens = ids[BLOCK_TOKENS * i : BLOCK_TOKENS * (i + 1)]
        return encode_shard(spec, BLOCK_TOKENS * i, tokens, k_tiles[tiles], v_tiles[tiles])

    sizes = [payload_bytes(spec, min(BLOCK_TOKENS, ids.numel() - i)) for i in range(0, ids.numel(), BLOCK_TOKENS)]
    done = list(in_parallel(lambda i: _put_block(directory, encoded(i)), range(len(sizes)), sizes, progress))
    manifest = Manifest(spec, ids.numel(), tuple(block_id for block_id, _ in done))
    _commit(directory, manifest, encoded)
    new = sum(is_new for _, is_new in done)
    return Published(manifest.digest, ids.numel(), new, len(done) - new, sum(sizes)), manifest


def _put_block(directory: Directory, data: bytes) -> tuple[str, bool]:
    """Make the store hold a block; a file in its place with other bytes goes to quarantine first."""
    block_id = hashlib.sha256(data).hexdigest()
    path = directory.block_path(block_id)
    if _is_there(directory, path, "a block", data, block_id):
        return block_id, False
    with directory.lock(exclusive=False):  # gc puts nothing in its place meanwhile
        directory.write(path, data)
    return block_id, True


def put_table(directory: Directory, data: bytes) -> str:
    """Keep a table; see `BlockStore.put_table`."""
    if len(data) > MAX_TABLE_BYTES:
        raise LayoutError(f"this model has a table of {len(data)} bytes, over the limit of {MAX_TABLE_BYTES}")
    directory.require_real_folders()
    digest = hashlib.sha256(data).hexdigest()
    path = directory.table_path(digest)
    if not _is_there(directory, path, "a table", data, digest):
        with directory.lock(exclusive=False):
            directory.write(path, data)
            directory.sync(path.parent)
            directory.sync(directory.root)
    return digest


def _commit(directory: Directory, manifest: Manifest, encoded: Callable[[int], bytes]) -> None:
    """Make the document visible when every block is there and durable."""
    path, data = directory.manifest_path(manifest.digest), manifest.to_bytes()
    is_there = _is_there(directory, path, "a manifest", data, manifest.digest)
    with directory.lock(exclusive=False):  # from here on gc neither looks nor moves
        for i, block_id in enumerate(manifest.blocks):
            if not os.path.lexists(directory.block_path(block_id)):  # gc met it before the manifest named it
                directory.write(directory.block_path(block_id), encoded(i))
        # Names that others have made too: their maker may not yet have made them durable.
        folders = {directory.block_path(block_id).parent for block_id in manifest.blocks}
        for folder in (*folders, directory.root / "blocks", directory.root):
            directory.sync(folder)
        if not is_there or not os.path.lexists(path):
            directory.write(path, data)
        directory.sync(path.parent)
        directory.mark_healed(manifest.digest)


def _is_there(directory: Directory, path: Path, what: str, data: bytes, digest: str) -> bool:
    """Tell whether a file holds `data`; one that holds something else goes to quarantine."""
    try:
        if holds(path, what, data):
            return True
    except FileNotFoundError:
        return False
    damaged = DamagedFile(f"{path}: SHA-256: not what the name promises", path, digest, len(data))
    directory.quarantine(damaged, wait=True)
    return False


def _require_readable(spec: KVSpec, num_tokens: int) -> None:
    """Refuse what every reader would refuse."""
    size = payload_bytes(spec, min(num_tokens, BLOCK_TOKENS))
    if size > MAX_PAYLOAD_BYTES:
        raise LayoutError(f"spec makes blocks of {size} bytes, over the limit of {MAX_PAYLOAD_BYTES}")
    size = len(Manifest(spec, num_tokens, ("0" * 64,) * blocks_for(num_tokens)).to_bytes())
    if size > MAX_MANIFEST_BYTES:
        raise LayoutError(
            f"spec and token_ids make a manifest of {size} bytes, over the limit of {MAX_MANIFEST_BYTES}: shorten "
            "config or producer_info, or publish the document in parts"
        )
