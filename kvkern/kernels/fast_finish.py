"""The end of a fast launch: programs arrive, and the last one of a row block folds all of its states and writes out."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.fast_rows import readers_of, rows_of_block, suffix_units, visible_keys
from kvkern.kernels.fast_state import empty_state, fold, fold_units
from kvkern.kernels.primitives import LN2, high_half, round16

TILE = tl.constexpr(64)


@triton.jit
def arrive(
    place, i, prefix, batch, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
    partial_ptr, counter_ptr, out_ptr, lse_ptr, stride_ob, stride_ot, stride_oh,
    max_query_len, per_block, parts, prefix_units, own_units, total_rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    UNIT_TILES: tl.constexpr, FOLD_ROWS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Count this program in; the last one of `place`, a row block and KV head, resets the counter and finishes."""
    shared_len = tl.load(prefix_len_ptr + prefix)  # again: to keep it would cost a register in the loop
    rank = tl.arange(0, BLOCK_M)
    wanted = tl.where(rank < per_block, i * per_block + rank, -1)
    members = readers_of(wanted, prefix, batch, reader_prefix_ptr)
    shared_units = (shared_len // TILE + UNIT_TILES - 1) // UNIT_TILES
    expected = shared_units + tl.sum(suffix_units(members, shared_len, suffix_len_ptr, UNIT_TILES), axis=0)
    rows = tl.sum((members >= 0).to(tl.int32), axis=0) * tl.minimum(GROUP * max_query_len, BLOCK_M)
    counter = counter_ptr + place
    tl.debug_barrier()  # all stores of this program come before its arrival
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1:
        tl.debug_barrier()  # and all loads below after the last one's
        tl.store(counter, 0)
        for first in range(0, rows, FOLD_ROWS):
            finish_rows(
                first + tl.arange(0, FOLD_ROWS), place, i, place // KV_HEADS % parts, prefix, shared_len, batch,
                reader_prefix_ptr, suffix_len_ptr, query_len_ptr, partial_ptr, out_ptr, lse_ptr,
                stride_ob, stride_ot, stride_oh, max_query_len, per_block, prefix_units, own_units, total_rows,
                KV_HEADS, GROUP, HEAD_DIM, BLOCK_M, UNIT_TILES, FOLD_ROWS, HAS_LSE,
            )  # fmt: skip


@triton.jit
def finish_rows(
    lane, place, i, j, prefix, shared_len, batch,
    reader_prefix_ptr, suffix_len_ptr, query_len_ptr, partial_ptr, out_ptr, lse_ptr,
    stride_ob, stride_ot, stride_oh, max_query_len, per_block, prefix_units, own_units, total_rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    UNIT_TILES: tl.constexpr, ROWS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Fold all states of some rows of a row block, prefix before suffix, and write out and lse."""
    rows_per_reader, kv_head = GROUP * max_query_len, place % KV_HEADS
    reader, row = rows_of_block(lane, i, j, prefix, batch, rows_per_reader, per_block, reader_prefix_ptr, BLOCK_M)
    real = reader >= 0
    shared_units = (shared_len // TILE + UNIT_TILES - 1) // UNIT_TILES
    own_count = suffix_units(reader, shared_len, suffix_len_ptr, UNIT_TILES)
    own_rows = total_rows - batch * KV_HEADS * own_units * rows_per_reader
    shared = place.to(tl.int64) * prefix_units * BLOCK_M + lane
    own = own_rows + (reader * KV_HEADS + kv_head).to(tl.int64) * own_units * rows_per_reader + row
    m_i, l_i, acc = empty_state(ROWS, HEAD_DIM)
    for part in range(0, 2):
        m_p, l_p, acc_p = fold_units(
            partial_ptr, tl.where(part == 0, shared, own), tl.where(part == 0, BLOCK_M, rows_per_reader),
            tl.where(real & (part == 0), shared_units, own_count),
            tl.where(part == 0, 0, shared_len // TILE // UNIT_TILES),
            tl.where(part == 0, shared_units, tl.max(own_count, axis=0)),
            total_rows, UNIT_TILES, ROWS, HEAD_DIM,
        )  # fmt: skip
        m_i, l_i, acc = fold(m_i, l_i, acc, m_p, l_p, acc_p)
    visible = visible_keys(reader, row, shared_len, suffix_len_ptr, query_len_ptr, max_query_len, GROUP)
    total = tl.where(l_i == 0.0, 1.0, l_i)
    value = acc * (1.0 / total)[:, None]
    bits = tl.where(value == value, high_half(round16(value)), 0x7FC0)
    bits = tl.where((visible > 0)[:, None], bits, 0)
    head, query = kv_head * GROUP + row % GROUP, row // GROUP
    out_row = reader * stride_ob + query * stride_ot + head * stride_oh
    channel = tl.arange(0, HEAD_DIM)
    tl.store(out_ptr + out_row[:, None] + channel[None, :], bits.to(tl.int16), mask=real[:, None])
    if HAS_LSE:
        lse = tl.where(visible > 0, (m_i + tl.log2(total)) * LN2, float("-inf"))
        lse_row = (reader * KV_HEADS * GROUP + head).to(tl.int64) * max_query_len + query
        tl.store(lse_ptr + lse_row, lse, mask=real)
