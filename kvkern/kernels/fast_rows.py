"""Which rows a program of the fast kernel holds: readers that share a prefix, packed into one tile of rows.

A reader has R = GROUP * Tq rows for each KV head. A row block holds the rows of `per_block` = BLOCK_M // R readers of
one prefix, in the order of the batch; when R is larger than BLOCK_M, `per_block` is 1 and a reader has `parts` blocks.
Blocks of all prefixes are numbered without a plan: those of prefix p start at (readers of prefixes before p) //
per_block + p.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
"""Readers that are compared at once."""


@triton.jit
def readers_before(end, prefix, batch, reader_prefix_ptr):
    """Count readers of a prefix before reader `end`, and readers of all prefixes before that one."""
    same = tl.zeros([LANES], tl.int32)
    lower = tl.zeros([LANES], tl.int32)
    for first in range(0, batch, LANES):
        lane = first + tl.arange(0, LANES)
        there = tl.load(reader_prefix_ptr + lane, mask=lane < batch, other=0x7FFFFFFF)
        same += ((there == prefix) & (lane < end)).to(tl.int32)
        lower += (there < prefix).to(tl.int32)
    return tl.sum(same, axis=0), tl.sum(lower, axis=0)


@triton.jit
def prefix_of_block(block, prefixes, search_steps, per_block, batch, reader_prefix_ptr):
    """Find the prefix whose blocks hold a number, by halving."""
    low = tl.zeros([], tl.int32)
    high = prefixes - 1 + low
    for _ in range(0, search_steps):
        middle = (low + high + 1) // 2
        _, lower = readers_before(0, middle, batch, reader_prefix_ptr)
        is_it = lower // per_block + middle <= block
        low, high = tl.where(is_it, middle, low), tl.where(is_it, high, middle - 1)
    return low


@triton.jit
def readers_of(wanted, prefix, batch, reader_prefix_ptr):
    """Return for each rank in `wanted` the reader of that rank among those of a prefix, or -1."""
    reader = wanted * 0 - 1
    seen = tl.zeros([], tl.int32)
    for first in range(0, batch, LANES):
        lane = first + tl.arange(0, LANES)
        uses = (tl.load(reader_prefix_ptr + lane, mask=lane < batch, other=-1) == prefix).to(tl.int32)
        rank = seen + tl.cumsum(uses, axis=0) - 1
        is_it = (rank[None, :] == wanted[:, None]) & (uses[None, :] > 0)
        reader = tl.maximum(reader, tl.max(tl.where(is_it, lane[None, :], -1), axis=1))
        seen += tl.sum(uses, axis=0)
    return reader


@triton.jit
def rows_of_block(
    lane, i, j, prefix, batch, rows_per_reader, per_block, reader_prefix_ptr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Return reader and row of each lane of part j of the i-th row block of a prefix; reader -1 where there is none."""
    step = tl.minimum(rows_per_reader, BLOCK_M)
    member = lane // step
    row = j * BLOCK_M + lane - member * step
    is_row = (member < per_block) & (row < rows_per_reader)
    reader = readers_of(tl.where(is_row, i * per_block + member, -1), prefix, batch, reader_prefix_ptr)
    return reader, row


@triton.jit
def visible_keys(reader, row, shared_len, suffix_len_ptr, query_len_ptr, max_query_len, GROUP: tl.constexpr):
    """Keys that each row sees: 0 for padding and for rows of no reader."""
    query = row // GROUP
    real = reader >= 0
    own = tl.load(suffix_len_ptr + reader, mask=real, other=0)
    queries = tl.load(query_len_ptr + reader, mask=real, other=0)
    keys = tl.maximum(shared_len + own - (max_query_len - 1 - query), 0)
    return tl.where(real & (query >= max_query_len - queries), keys, 0)


@triton.jit
def suffix_units(reader, shared_len, suffix_len_ptr, UNIT_TILES: tl.constexpr):
    """Units of each reader's own tiles by absolute position: at least 1, so that every reader arrives; 0 for -1."""
    own = tl.load(suffix_len_ptr + reader, mask=reader >= 0, other=0)
    first = shared_len // 64
    last = tl.maximum((shared_len + own + 63) // 64 - 1, first)
    return tl.where(reader >= 0, last // UNIT_TILES - first // UNIT_TILES + 1, 0)
