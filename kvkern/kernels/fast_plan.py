"""The plan of a fast launch: grid, unit and work space from capacities alone, never from lengths.

Lengths stay on the device, so that one captured graph serves every length up to its capacity. No bit depends on the
unit: it is chosen by the cost model of `fast_cost`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvkern.contract import TILE_TOKENS
from kvkern.kernels.fast_cost import seconds

if TYPE_CHECKING:
    from kvkern.kernels.launch_config import FastConfig


@dataclass(frozen=True)
class FastShape:
    """Capacities of a call.

    Attributes:
        readers: readers in the batch.
        prefixes: rows of the block table.
        num_kv_heads: KV heads.
        gqa_group_size: query heads of a KV head.
        max_query_len: query rows of a reader.
        head_dim: channels.
        prefix_tiles: tiles that a row of the block table lists.
        suffix_tiles: tiles of a reader's suffix.
    """

    readers: int
    prefixes: int
    num_kv_heads: int
    gqa_group_size: int
    max_query_len: int
    head_dim: int
    prefix_tiles: int
    suffix_tiles: int

    @property
    def rows_per_reader(self) -> int:
        """Query rows of a reader and KV head."""
        return self.gqa_group_size * self.max_query_len


@dataclass(frozen=True)
class FastPlan:
    """What a launch needs to know.

    Attributes:
        shape: the capacities that it was made for.
        unit_tokens: keys of a program.
        per_block: readers of a row block.
        parts: row blocks of a reader.
        row_blocks: row blocks of all prefixes, at most.
        search_steps: halvings that find the prefix of a row block.
        prefix_units: units of a prefix, at most.
        suffix_units: units of a reader's suffix, at most.
        prefix_programs: programs of a KV head that read prefixes; those of the suffixes follow.
        head_programs: all programs of a KV head; those of the next head follow.
        partial_rows: rows of states.
        partial_bytes: bytes of states.
        counters: int32 that are 0 before and after a launch.
    """

    shape: FastShape
    unit_tokens: int
    per_block: int
    parts: int
    row_blocks: int
    search_steps: int
    prefix_units: int
    suffix_units: int
    prefix_programs: int
    head_programs: int
    partial_rows: int
    partial_bytes: int
    counters: int

    @property
    def programs(self) -> int:
        """All programs of a launch."""
        return self.head_programs * self.shape.num_kv_heads


@functools.lru_cache(maxsize=1024)
def plan_with(shape: FastShape, block_m: int, unit_tokens: int) -> FastPlan:
    """Lay out a call with a given unit."""
    rows, unit_tiles = shape.rows_per_reader, unit_tokens // TILE_TOKENS
    per_block, parts = max(1, block_m // max(rows, 1)), max(1, -(-rows // block_m))
    # Readers fill floor(readers / per_block) blocks, and every prefix may leave one block partly filled.
    blocks = shape.readers // per_block + shape.prefixes
    row_blocks = parts * (-(-shape.readers // per_block) if shape.prefixes == 1 else blocks)
    prefix_units = -(-shape.prefix_tiles // unit_tiles)
    suffix_units = (max(shape.suffix_tiles, 1) + unit_tiles - 2) // unit_tiles + 1
    prefix_programs, own_programs = prefix_units * row_blocks, shape.readers * suffix_units * parts
    partial_rows = shape.num_kv_heads * (prefix_programs * block_m + shape.readers * suffix_units * rows)
    return FastPlan(
        shape, unit_tokens, per_block, parts, row_blocks, max(shape.prefixes - 1, 0).bit_length(), prefix_units,
        suffix_units, prefix_programs, prefix_programs + own_programs, partial_rows,
        4 * partial_rows * (shape.head_dim + 2), row_blocks * shape.num_kv_heads,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def plan(shape: FastShape, config: FastConfig) -> FastPlan:
    """Lay out a call with the unit that the cost model finds cheapest when all capacities are used."""
    plans = [plan_with(shape, config.block_m, unit) for unit in config.units(shape.head_dim)]
    return min(plans, key=lambda made: seconds(made, config))
