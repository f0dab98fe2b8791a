"""Publish: a document becomes visible in one step, after its blocks are whole, durable and in place."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from kvkern.layout.files import DamagedFile, accessing, holds, make_folder, sync_folder, write_atomically
from kvkern.layout.header import payload_bytes
from kvkern.layout.manifest import Manifest
from kvkern.layout.parallel import in_parallel
from kvkern.layout.records import Published
from kvkern.layout.shard import encode_shard
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, pack, require_finite_kv

if TYPE_CHECKING:
    from collections.abc import Callable

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
    try:
        is_there, identity = holds(path, "a block", data)
        if is_there:
            return block_id, False
        directory.quarantine(DamagedFile("", path, identity))
    except FileNotFoundError:
        pass
    with accessing(path, "write"):
        make_folder(path.parents[1])
    write_atomically(path, data)
    return block_id, True


def _commit(directory: Directory, manifest: Manifest, encoded: Callable[[int], bytes]) -> None:
    """Make the document visible when every block is there and durable."""
    with directory.lock(exclusive=False):  # from here on gc neither looks nor moves
        for i, block_id in enumerate(manifest.blocks):
            if not os.path.lexists(directory.block_path(block_id)):  # gc met it before the manifest named it
                write_atomically(directory.block_path(block_id), encoded(i))
        # Reused blocks too: another process may have renamed them and not yet made that durable.
        for folder in {directory.block_path(block_id).parent for block_id in manifest.blocks}:
            sync_folder(folder)
        path = directory.manifest_path(manifest.digest)
        write_atomically(path, manifest.to_bytes())
        sync_folder(path.parent)
