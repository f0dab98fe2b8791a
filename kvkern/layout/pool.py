"""Pool: the mapped shards of a document, and the offsets by which a kernel reads them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvkern.contract import TILE_TOKENS
from kvkern.errors import LayoutError
from kvkern.layout.tiles import BLOCK_TILES, tiles_for, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvkern.layout.manifest import Manifest
    from kvkern.layout.shard import Shard


@dataclass(frozen=True, eq=False)
class MappedPool:
    """Blocks where they lie, each in its own read-only mapping; or, from `upload`, all in one arena on a device.

    Attributes:
        anchor: bf16 view of the first block's K, or the arena; offsets count from `anchor.data_ptr()`.
        block_table: `[n, 2]` int64 on the CPU, offsets in bf16 ELEMENTS of each block's K and V,
            of either sign.
        shards: keep the mappings alive; hold the pool for as long as a kernel may read.
    """

    anchor: Tensor
    block_table: Tensor
    shards: tuple[Shard, ...]

    def table_from(self, anchor: Tensor) -> Tensor:
        """Return the block table counted from another pool's anchor, `[n, 2]` int64."""
        return self.block_table + _elements_between(anchor, self.anchor)


@dataclass(frozen=True, eq=False)
class Document:
    """A manifest with its verified, mapped shards.

    Attributes:
        manifest: the document.
        shards: one per block, in order.
        lease: keeps the document's lease for as long as it lives.
    """

    manifest: Manifest
    shards: tuple[Shard, ...]
    lease: object = None

    def token_ids(self) -> Tensor:
        """Return the document's tokens, `[num_tokens]` int64, as the verified shards hold them."""
        return torch.cat([s.tokens.reshape(-1)[: s.count] for s in self.shards]).to(torch.int64)

    def kv(self, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Copy the K and V of some tokens out of their tiles.

        Args:
            first: the first token.
            count: how many; None for all that follow.

        Returns:
            K and V, `[layers, kv_heads, count, head_dim]` bf16.
        """
        last = self.manifest.num_tokens if count is None else first + count
        begin, tiles = first // TILE_TOKENS, range(first // TILE_TOKENS, tiles_for(last))
        shards = [(self.shards[tile // BLOCK_TILES], tile % BLOCK_TILES) for tile in tiles]
        k, v = (torch.stack([getattr(shard, part)[i] for shard, i in shards]) for part in "kv")
        k, v = unpack(k, v, last - begin * TILE_TOKENS)
        return k[:, :, first - begin * TILE_TOKENS :], v[:, :, first - begin * TILE_TOKENS :]

    def pool(self) -> MappedPool:
        """Return the pool over this document's blocks."""
        return map_pool(self.shards)


def map_pool(shards: Sequence[Shard]) -> MappedPool:
    """Address mapped shards from one base, without copying them.

    Args:
        shards: at least one, in document order.

    Raises:
        LayoutError: no shards.
    """
    if not shards:
        raise LayoutError("shards must hold at least one block")
    anchor = shards[0].k
    rows = [[_elements_between(anchor, s.k), _elements_between(anchor, s.v)] for s in shards]
    return MappedPool(anchor, torch.tensor(rows, dtype=torch.int64), tuple(shards))


def upload(pool: MappedPool, device: torch.device) -> MappedPool:
    """Copy a pool's blocks into one arena on a device; readers there share it.

    Args:
        pool: mapped shards.
        device: where the arena goes.

    Returns:
        A pool whose anchor is the arena, `[elements]` bf16, and whose shards are still the mapped ones.
    """
    parts = [part for shard in pool.shards for part in (shard.k, shard.v)]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.numel())
    arena = torch.empty(starts[-1], dtype=torch.bfloat16, device=device)
    for start, part in zip(starts[:-1], parts, strict=True):
        arena[start : start + part.numel()].copy_(part.reshape(-1))
    return MappedPool(arena, torch.tensor(starts[:-1], dtype=torch.int64).view(-1, 2), pool.shards)


def stack_tables(tables: Sequence[Tensor]) -> Tensor:
    """Stack the block tables of several prefixes that count from one anchor.

    Args:
        tables: P tensors `[n_p, 2]` int64.

    Returns:
        `[P, max n_p, 2]` int64, shorter tables padded with zeros.

    Raises:
        LayoutError: no tables, or one of another shape or dtype.
    """
    if not tables:
        raise LayoutError("tables must hold at least one block table")
    for i, table in enumerate(tables):
        if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 2:
            given = f"{tuple(table.shape)} {table.dtype}"
            raise LayoutError(f"tables[{i}] must be [n, 2] torch.int64, got {given}")
    return torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)


def _elements_between(base: Tensor, other: Tensor) -> int:
    distance_bytes = other.data_ptr() - base.data_ptr()
    if distance_bytes % 2:
        raise LayoutError("blocks of a pool must lie on even addresses")
    return distance_bytes // 2
