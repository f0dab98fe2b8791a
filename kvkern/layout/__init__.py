"""The format and the store, free of any model: tiles, shards, manifests, index, pool."""

from kvkern.layout.blockstore import GRACE_S, BlockStore
from kvkern.layout.manifest import Manifest
from kvkern.layout.pool import Document, MappedPool, map_pool, stack_tables, upload
from kvkern.layout.records import Collected, Defect, Explanation, Published, Report, Summary
from kvkern.layout.shard import Shard, encode_shard, map_shard
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, TILE_TOKENS, blocks_for, pack, unpack

__all__ = [
    "BLOCK_TILES",
    "BLOCK_TOKENS",
    "GRACE_S",
    "TILE_TOKENS",
    "BlockStore",
    "Collected",
    "Defect",
    "Document",
    "Explanation",
    "Manifest",
    "MappedPool",
    "Published",
    "Report",
    "Shard",
    "Summary",
    "blocks_for",
    "encode_shard",
    "map_pool",
    "map_shard",
    "pack",
    "stack_tables",
    "unpack",
    "upload",
]
