"""Fast attention in Triton: tensor cores, one launch a layer, prefixes and suffixes in one list of programs.

    out = softmax(q k c) v, in fp32 states over bf16 products

A program takes a row block (see `fast_rows`), one KV head and one unit of keys, of a prefix or of one reader's suffix.
It leaves a state per row; of the programs of a row block the last to arrive folds all of its states and writes out.

Bits depend on q, K and V by position, sm_scale and 64 * (prefix_len // 64) alone. A leaf of 256 keys, cut at multiples
of 256 by absolute position and once more where the shared tiles end, is always computed from the empty state, tile by
tile, and leaves are folded by the tree of `fast_state`, whoever does it. So units of 256, 1,024 or 4,096 keys, any
order of readers, any company, any block table and any order of arrival have the same bits. The tile of rows is one
size: one reader runs the instructions that a crowd runs. A row of a tensor core's product is taken not to depend on its
place in the tile, and the hardware's exponential to be a function.

Triton's interpreter multiplies the raw bits of bf16 and truncates towards it, so with WIDEN the same values are
multiplied as fp32 and rounded by integers: that form is run by the tests, the other one is compiled by the gate. V is
masked behind the last key; a V that is not finite reaches rows that may not see it (p is 0 there, but 0 * inf is NaN).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.fast_finish import arrive
from kvkern.kernels.fast_rows import prefix_of_block, readers_before, rows_of_block, visible_keys
from kvkern.kernels.fast_state import FAN, LEAF_TILES, empty_state, finite, fold, load_state, store_state
from kvkern.kernels.primitives import round16

TILE = tl.constexpr(64)
GRAIN = tl.constexpr(32)
"""Elements by which the loop counts addresses: 64 bytes; 32 bits of them reach 137 GB either way."""


# No integer is compiled in because it is 1 or a multiple of 16: what the gate compiles is what runs, for any batch.
INTEGERS = [
    "stride_qb", "stride_qh", "stride_qt", "stride_sb", "stride_sh", "stride_st", "stride_tile", "layer_offset",
    "stride_ob", "stride_ot", "stride_oh", "batch", "prefixes", "search_steps", "max_blocks", "max_query_len",
    "per_block", "parts", "row_blocks", "prefix_units", "own_units", "prefix_programs", "total_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def fast_kernel(
    q_ptr,  # [B, Hq, Tq, D] bf16
    pool_ptr,  # bf16; the prefixes' tiles are addressed from here
    suffix_k_ptr,  # [B, Hkv, tiles, D, 64] bf16
    suffix_v_ptr,  # [B, Hkv, tiles, 64, D] bf16
    table_ptr,  # [P, max_blocks, 2] int64, offsets in elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    partial_ptr,  # fp32 states: [row blocks, Hkv, prefix units, BLOCK_M] rows, [B, Hkv, suffix units, GROUP * Tq] rows
    counter_ptr,  # [row blocks, Hkv] int32, 0 before and after
    out_ptr,  # [B, Tq, Hq, D] int16
    lse_ptr,  # [B, Hq, Tq] fp32
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    batch, prefixes, search_steps, max_blocks, max_query_len, per_block, parts, row_blocks, prefix_units, own_units,
    prefix_programs,
    total_rows: tl.int64,
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, UNIT_TILES: tl.constexpr, FOLD_ROWS: tl.constexpr, STAGES: tl.constexpr,
    HAS_LSE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Attend to one unit; the last program of a row block finishes its rows."""
    # Head by head, so that the states under way are those of a head or two. In a head, row blocks that read the same
    # keys are neighbours, and prefixes, the heavy programs, come first.
    kv_head, in_prefix = tl.program_id(1), tl.program_id(0) < prefix_programs
    program = tl.where(in_prefix, tl.program_id(0), tl.program_id(0) - prefix_programs)
    width, units = tl.where(in_prefix, row_blocks, parts), tl.where(in_prefix, tl.maximum(prefix_units, 1), own_units)
    unit, j = program // width % units, program % width % parts
    b = tl.where(in_prefix, 0, program // width // units)
    if in_prefix:
        block = program % width // parts
        prefix = prefix_of_block(block, prefixes, search_steps, per_block, batch, reader_prefix_ptr)
        count, lower = readers_before(batch, prefix, batch, reader_prefix_ptr)
        i = block - (lower // per_block + prefix)
    else:
        prefix = tl.load(reader_prefix_ptr + b)
        count, lower = readers_before(b, prefix, batch, reader_prefix_ptr)
        i = count // per_block
        block = i + lower // per_block + prefix
    place = (block * parts + j) * KV_HEADS + kv_head
    shared_len = tl.load(prefix_len_ptr + prefix)
    shared_tiles = shared_len // TILE
    end_tile = tl.where(in_prefix, shared_tiles, (shared_len + tl.load(suffix_len_ptr + b) + TILE - 1) // TILE)
    # A unit of nothing is live when it is a reader's first: every row block then has somebody to write it.
    first_tile = (tl.where(in_prefix, 0, shared_tiles // UNIT_TILES) + unit) * UNIT_TILES
    if tl.where(in_prefix, (i * per_block < count) & (first_tile < end_tile), (unit == 0) | (first_tile < end_tile)):
        lane = tl.arange(0, BLOCK_M)
        rows_per_reader = GROUP * max_query_len
        if in_prefix:
            reader, row = rows_of_block(
                lane, i, j, prefix, batch, rows_per_reader, per_block, reader_prefix_ptr, BLOCK_M
            )
            state = place.to(tl.int64) * prefix_units * BLOCK_M + unit * BLOCK_M
        else:
            row = j * BLOCK_M + lane
            reader = tl.where(row < rows_per_reader, b, -1)
            state = ((b * KV_HEADS + kv_head) * own_units + unit).to(tl.int64) * rows_per_reader + j * BLOCK_M
            state += total_rows - batch * KV_HEADS * own_units * rows_per_reader
        visible = visible_keys(reader, row, shared_len, suffix_len_ptr, query_len_ptr, max_query_len, GROUP)
        head, query = kv_head * GROUP + row % GROUP, row // GROUP
        q_offset = reader * stride_qb + head * stride_qh + query * stride_qt
        q_rows = q_ptr + tl.multiple_of(q_offset, 8)  # the door has checked that q lies in 16 bytes
        q = tl.load(q_rows[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=(reader >= 0)[:, None], other=0)
        end_tile = tl.minimum(end_tile, first_tile + UNIT_TILES)
        limit = tl.minimum(end_tile * TILE, tl.max(visible, axis=0))
        suffix_start = b * stride_sb + kv_head * stride_sh - shared_tiles * stride_st
        start = tl.where(in_prefix, layer_offset + kv_head * (HEAD_DIM * TILE), suffix_start)
        attend_unit(
            q, visible, reader >= 0, state, first_tile, tl.where(in_prefix, 0, shared_tiles), end_tile, limit,
            scale, in_prefix, tl.where(in_prefix, pool_ptr, suffix_k_ptr), tl.where(in_prefix, pool_ptr, suffix_v_ptr),
            table_ptr + (prefix * max_blocks).to(tl.int64) * 2, start, tl.where(in_prefix, stride_tile, stride_st),
            partial_ptr, total_rows, HEAD_DIM, BLOCK_TILES, BLOCK_M, UNIT_TILES, STAGES, WIDEN,
        )  # fmt: skip
        arrive(
            place, i, prefix, batch, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
            partial_ptr, counter_ptr, out_ptr, lse_ptr, stride_ob, stride_ot, stride_oh,
            max_query_len, per_block, parts, prefix_units, own_units, total_rows,
            KV_HEADS, GROUP, HEAD_DIM, BLOCK_M, UNIT_TILES, FOLD_ROWS, HAS_LSE,
        )  # fmt: skip


@triton.jit
def attend_unit(
    q, visible, real, state, first_tile, start_tile, end_tile, limit, scale, in_prefix,
    k_ptr, v_ptr, blocks_ptr, start, stride_tile, partial_ptr, total_rows,
    HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_M: tl.constexpr, UNIT_TILES: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Leave the states of one unit: of its leaf, or of its leaves folded 1,024 keys at a time."""
    BRANCH_TILES: tl.constexpr = UNIT_TILES if UNIT_TILES < LEAF_TILES * FAN else LEAF_TILES * FAN
    LEAVES: tl.constexpr = BRANCH_TILES // LEAF_TILES
    BRANCHES: tl.constexpr = UNIT_TILES // BRANCH_TILES
    lane = tl.arange(0, BLOCK_M)
    for branch in range(0, BRANCHES):
        begin = first_tile + branch * BRANCH_TILES
        k_starts = ()
        v_starts = ()
        for leaf in tl.static_range(LEAVES):  # where each leaf lies is looked up here: no load of it in the loop below
            tile = begin + leaf * LEAF_TILES
            entry = blocks_ptr + (tile // BLOCK_TILES) * 2
            in_pool = in_prefix & (tile < end_tile)
            inner = start + tl.where(in_prefix, tile % BLOCK_TILES, tile) * stride_tile
            k_start = tl.load(entry, mask=in_pool, other=0) + inner
            v_start = tl.load(entry + 1, mask=in_pool, other=0) + inner
            k_starts = k_starts + (grains(k_start, WIDEN),)
            v_starts = v_starts + (grains(v_start, WIDEN),)
        m_i, l_i, acc = attend_branch(
            q, visible, begin, tl.maximum(start_tile, begin), tl.minimum(end_tile, begin + BRANCH_TILES), limit, scale,
            k_ptr, v_ptr, k_starts, v_starts, grains(stride_tile, WIDEN), HEAD_DIM, BLOCK_M, LEAVES, STAGES, WIDEN,
        )  # fmt: skip
        if BRANCHES > 1:
            tl.debug_barrier()
            m_a, l_a, acc_a = load_state(partial_ptr, state, lane, real & (branch > 0), total_rows, HEAD_DIM)
            m_i, l_i, acc = fold(m_a, l_a, acc_a, m_i, l_i, acc)
        store_state(partial_ptr, state, lane, real, m_i, l_i, acc, total_rows, HEAD_DIM)


@triton.jit
def grains(elements, WIDEN: tl.constexpr):
    """Count elements by GRAIN: 32 bits on a GPU, whose pool is one arena; a CPU's mapped files lie further apart."""
    count = elements // GRAIN
    if WIDEN:
        return count
    else:
        return count.to(tl.int32)


@triton.jit
def attend_branch(
    q, visible, begin, start_tile, end_tile, limit, scale, k_ptr, v_ptr, k_starts, v_starts, stride_tile,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, LEAVES: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return the states of up to LEAVES leaves: each from the empty state, folded from left to right."""
    lane, channel = tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    k_ptrs = k_ptr + channel[:, None] * TILE + lane[None, :]
    v_ptrs = v_ptr + lane[:, None] * HEAD_DIM + channel[None, :]
    m_i, l_i, acc = empty_state(BLOCK_M, HEAD_DIM)
    m_leaf, l_leaf, acc_leaf = empty_state(BLOCK_M, HEAD_DIM)
    for tile in tl.range(start_tile, end_tile, num_stages=STAGES):
        k_at, v_at = k_starts[0], v_starts[0]
        for leaf in tl.static_range(1, LEAVES):
            is_there = (tile - begin) // LEAF_TILES == leaf
            k_at, v_at = tl.where(is_there, k_starts[leaf], k_at), tl.where(is_there, v_starts[leaf], v_at)
        inner = ((tile - begin) % LEAF_TILES) * stride_tile
        if LEAVES > 1:  # noqa: SIM102 - known when compiled
            if (tile - begin) % LEAF_TILES == 0:
                m_i, l_i, acc = fold(m_i, l_i, acc, m_leaf, l_leaf, acc_leaf)
                m_leaf, l_leaf, acc_leaf = empty_state(BLOCK_M, HEAD_DIM)
        k = tl.load(k_ptrs + (k_at + inner).to(tl.int64) * GRAIN)
        key = tile * TILE + lane
        v = tl.load(v_ptrs + (v_at + inner).to(tl.int64) * GRAIN, mask=(key < limit)[:, None], other=0)
        s = product(q, k, WIDEN) * scale
        s = tl.where(key[None, :] < visible[:, None], s, float("-inf"))
        m_new = tl.maximum(m_leaf, tl.max(s, axis=1))
        decay = tl.exp2(m_leaf - finite(m_new))
        p = tl.exp2(s - finite(m_new)[:, None])
        l_leaf = l_leaf * decay + tl.sum(p, axis=1)
        acc_leaf = weigh(p, v, acc_leaf * decay[:, None], WIDEN)
        m_leaf = m_new
    return fold(m_i, l_i, acc, m_leaf, l_leaf, acc_leaf)


@triton.jit
def product(q, k, WIDEN: tl.constexpr):
    """Multiply q and k into fp32."""
    return tl.dot(widen(q), widen(k), input_precision="ieee") if WIDEN else tl.dot(q, k)


@triton.jit
def weigh(p, v, acc, WIDEN: tl.constexpr):
    """Add the values, weighted by p rounded to bf16, to acc."""
    return tl.dot(round16(p), widen(v), acc, input_precision="ieee") if WIDEN else tl.dot(p.to(tl.bfloat16), v, acc)


@triton.jit
def widen(words):
    """Return bf16 bits, loaded as int16, as fp32."""
    return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
