"""The format and the store, free of any model: tiles, shards, manifests, index, pool."""

from kvkern.layout.blockstore import BlockStore
from kvkern.layout.manifest import Manifest
from kvkern.layout.pool import Document, MappedPool, map_pool, stack_tables
from kvkern.layout.records import Defect, Published, Report, Summary
from kvkern.layout.shard import Shard, encode_shard, map_shard
from kvkern.layout.tiles import BLOCK_TILES, BLOCK_TOKENS, TILE_TOKENS, pack, unpack

__all__ = [
    "BLOCK_TILES",
    "BLOCK_TOKENS",
    "TILE_TOKENS",
    "BlockStore",
    "Defect",
    "Document",
    "Manifest",
    "MappedPool",
    "Published",
    "Report",
    "Shard",
    "Summary",
    "encode_shard",
    "map_pool",
    "map_shard",
    "pack",
    "stack_tables",
    "unpack",
]
