"""What a fast launch costs, computed from its plan: bytes, operations, programs, predicted time. Nothing is measured.

The floor reads every key once (suffixes included), q once, and writes out once. The plan adds states: written once
to memory, and read back from the last cache when those under way fit it, from memory when they do not. Under way are
the states of two KV heads: one is being folded while the next one begins. Row blocks of one prefix run side by side:
the first brings a tile from memory, the others find it in the last cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvkern.contract import TILE_TOKENS

if TYPE_CHECKING:
    from kvkern.kernels.fast_plan import FastPlan
    from kvkern.kernels.launch_config import FastConfig

FOLD_DEPTH = 3
"""States of `fold_rows` rows under way while one is folded: the depth of that loop's pipeline."""
IDLE_S = 0.5e-6
"""Of a program that finds nothing to do: three dependent loads."""


@dataclass(frozen=True)
class FastCost:
    """The cost of one launch, all readers sharing one prefix.

    Attributes:
        floor_bytes: from and to memory, at least.
        kv_bytes: K and V tiles, each once.
        cached_bytes: K and V tiles that further row blocks read from the last cache.
        state_bytes: states, written; they are read once more.
        state_bytes_under_way: those that are written and not yet read, at most.
        hbm_bytes: from and to memory under this plan.
        flops: of the products, padding rows included.
        live: programs with keys.
        idle: programs that leave at once.
        fold_bytes: states that one last arriver reads, at most.
        fold_steps: loads that it waits for, one after the other.
        launches: attention launches.
    """

    floor_bytes: int
    kv_bytes: int
    cached_bytes: int
    state_bytes: int
    state_bytes_under_way: int
    hbm_bytes: int
    flops: int
    live: int
    idle: int
    fold_bytes: int
    fold_steps: int
    launches: int = 1


def cost(made: FastPlan, config: FastConfig, prefix_len: int, suffix_len: int) -> FastCost:
    """Cost a plan for one prefix and equal suffixes.

    Args:
        made: the plan.
        config: for the tile of rows and the size of the cache.
        prefix_len: tokens of the prefix.
        suffix_len: tokens of each reader after it.
    """
    shape, unit_tiles = made.shape, made.unit_tokens // TILE_TOKENS
    rows, heads, head_dim = shape.rows_per_reader, shape.num_kv_heads, shape.head_dim
    blocks = -(-shape.readers // made.per_block) * made.parts
    shared = prefix_len // TILE_TOKENS
    end = -(-(prefix_len + suffix_len) // TILE_TOKENS)
    prefix_units = -(-shared // unit_tiles)
    suffix_units = max((end - 1) // unit_tiles - shared // unit_tiles + 1, 1)
    token_bytes = 2 * heads * head_dim * 2
    io_bytes = 2 * shape.readers * heads * rows * head_dim * 2
    own_tiles = shape.readers * (end - shared)
    kv_bytes = (shared + own_tiles) * TILE_TOKENS * token_bytes
    cached = (shared * (blocks - 1) + own_tiles * (made.parts - 1)) * TILE_TOKENS * token_bytes
    state_rows = shape.readers * heads * rows * (prefix_units + suffix_units)
    state_bytes = 4 * state_rows * (head_dim + 2)
    under_way = min(2, heads) * state_bytes // heads
    spilled = state_bytes if under_way > config.l2_bytes else 0
    tiles = (shared * blocks + own_tiles * made.parts) * heads
    live = heads * (prefix_units * blocks + shape.readers * suffix_units * made.parts)
    block_rows = min(config.block_m, rows * min(made.per_block, shape.readers))
    return FastCost(
        floor_bytes=(prefix_len + shape.readers * suffix_len) * token_bytes + io_bytes,
        kv_bytes=kv_bytes,
        cached_bytes=cached,
        state_bytes=state_bytes,
        state_bytes_under_way=under_way,
        hbm_bytes=kv_bytes + io_bytes + state_bytes + spilled,
        flops=tiles * 4 * config.block_m * TILE_TOKENS * head_dim,
        live=live,
        idle=made.programs - live,
        fold_bytes=4 * block_rows * (head_dim + 2) * (prefix_units + suffix_units),
        fold_steps=-(-block_rows // config.fold_rows) * (prefix_units + suffix_units),
    )


def seconds(made: FastPlan, config: FastConfig, prefix_len: int | None = None, suffix_len: int | None = None) -> float:
    """Predict the time of a launch: the slowest of memory, cache and products, then the last fold.

    Args:
        made: the plan.
        config: the machine.
        prefix_len: tokens; the capacity when None.
        suffix_len: tokens; the capacity when None.
    """
    shape = made.shape
    prefix_len = shape.prefix_tiles * TILE_TOKENS if prefix_len is None else prefix_len
    suffix_len = shape.suffix_tiles * TILE_TOKENS if suffix_len is None else suffix_len
    spent = cost(made, config, prefix_len, suffix_len)
    if not spent.live:
        return config.latency_s
    slots = config.sms * config.programs_per_sm
    waves = -(-spent.live // slots) * slots / spent.live if spent.live > slots else 1.0
    in_flight = max(config.stages - 1, 1) * 2 * TILE_TOKENS * shape.head_dim * 2
    asked = min(spent.live, slots) * in_flight / config.latency_s
    reach = min(spent.live, config.sms) * config.l2_bytes_s / config.sms  # what that many multiprocessors can take in
    memory = spent.hbm_bytes / min(config.hbm_bytes_s, asked, reach)
    cached = (spent.hbm_bytes + spent.cached_bytes + spent.state_bytes) / config.l2_bytes_s
    products = spent.flops / (config.flops_s * min(1.0, spent.live / config.sms))
    # The last arriver reads its states one after the other, FOLD_DEPTH under way.
    fold = max(spent.fold_bytes / (config.l2_bytes_s / config.sms), spent.fold_steps * config.latency_s / FOLD_DEPTH)
    idle = spent.idle * IDLE_S / slots
    return max(memory, cached, products) * waves + fold + idle + 4 * config.latency_s
