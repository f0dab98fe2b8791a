"""Output of the contract (A5): one chain per row, channel and run of keys; the last run to arrive adds the run sums."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_rows import all_keys, run_shift, visible_keys
from kvkern.kernels.exact_score import COUNTERS
from kvkern.kernels.primitives import rounded_bits, widen_high, widen_low

TILE = tl.constexpr(64)


@triton.jit
def output_run(
    block, run, piece, b, kv_head, p_ptr, pool_ptr, table_ptr, partial_ptr, flag_ptr, out_ptr, arrived_ptr,
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
    suffix_start, stride_sb, stride_sh, stride_st, stride_tile, layer_offset, stride_ob, stride_ot, stride_oh,
    max_blocks, num_rows, max_query_len, first_query, key_run, total_rows, key_capacity,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, TILES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Chain p and V of ROWS rows and 2 * WORDS channels over one run; a lane has one row and two channels."""
    prefix, query_len = tl.load(reader_prefix_ptr + b), tl.load(query_len_ptr + b)
    shared_tiles = tl.load(prefix_len_ptr + prefix) // TILE
    keys = all_keys(b, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr)
    shift = run_shift(key_run, query_len, keys)
    first_key, first_row = run << shift, block * ROWS
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    most = keys - (max_query_len - 1 - (first_query + last_row // GROUP))
    if (first_key < most) | (run == 0):
        lane = tl.arange(0, ROWS * WORDS)
        word = piece * WORDS + lane % WORDS
        row = tl.minimum(first_row + lane // WORDS, num_rows - 1)
        out_row = (b * KV_HEADS + kv_head).to(tl.int64) * num_rows + row
        fewest = keys - (max_query_len - 1 - (first_query + first_row // GROUP))
        end_key = tl.minimum(first_key + (1 << shift), most)
        end = (end_key + TILES * TILE - 1) // (TILES * TILE)  # trips of TILES tiles
        whole = tl.maximum(tl.minimum(fewest, end_key), 0) // (TILES * TILE)  # every row sees all keys of trips before
        trip = first_key // (TILES * TILE)
        blocks_ptr = table_ptr + (prefix * max_blocks).to(tl.int64) * 2 + 1
        channel = tl.minimum(word, HEAD_DIM // 2 - 1)
        shared = layer_offset + kv_head * (HEAD_DIM * TILE // 2)
        own = suffix_start + b * stride_sb + kv_head * stride_sh - shared_tiles * stride_st
        last_tile = tl.maximum(end_key - 1, 0) // TILE
        place = (pool_ptr + channel, last_tile, shared_tiles, blocks_ptr, stride_tile, shared, stride_st, own)
        words = ()
        v_ptrs = _tiles(place, trip, BLOCK_TILES, TILES)
        for tile in tl.static_range(TILES):
            for i in tl.static_range(TILE):
                words = words + (tl.load(v_ptrs[tile] + i * (HEAD_DIM // 2), mask=lane * 0 + trip < end),)
        v_ptrs = _tiles(place, trip + 1, BLOCK_TILES, TILES)
        p_ptrs = p_ptr + out_row * (key_capacity // 2)
        even, odd = tl.zeros([ROWS * WORDS], tl.float32), tl.zeros([ROWS * WORDS], tl.float32)
        # First the trips all of whose keys every row sees. Then the others: a key that a row does not see must not
        # touch its chain (A7), so what its slot holds is computed and dropped.
        for MASKED in tl.static_range(2):
            for now in range(tl.maximum(whole, trip) if MASKED else trip, end if MASKED else whole):
                seen = keys - (max_query_len - 1 - (first_query + row // GROUP)) - now * (TILES * TILE)
                trip_ptrs, has_next = p_ptrs + now * (TILES * TILE // 2), lane * 0 + now + 1 < end
                even, odd, words = _trip(even, odd, words, trip_ptrs, v_ptrs, has_next, seen, MASKED, TILES, HEAD_DIM)
                v_ptrs = _tiles(place, now + 2, BLOCK_TILES, TILES)
        inside = (word < HEAD_DIM // 2) & (first_row + lane // WORDS < num_rows)
        sums = partial_ptr + out_row * HEAD_DIM + 2 * word
        tl.store(sums + run * total_rows * HEAD_DIM, even, mask=inside)
        tl.store(sums + run * total_rows * HEAD_DIM + 1, odd, mask=inside)
        tl.debug_barrier()  # all stores of this program come before its arrival
        first_out = (b * KV_HEADS + kv_head).to(tl.int64) * num_rows + first_row
        count = tl.atomic_add(arrived_ptr + first_out * COUNTERS + 1 + piece, 1, sem="acq_rel", scope="gpu")
        runs = tl.maximum((most + (1 << shift) - 1) >> shift, 1)
        if count == runs - 1:
            tl.debug_barrier()  # and all loads below after the last one's
            query, head = first_query + row // GROUP, kv_head * GROUP + row % GROUP
            visible = visible_keys(keys, query, query_len, max_query_len)
            out_ptrs = out_ptr + b * stride_ob + query * stride_ot + head * stride_oh + 2 * word
            is_nan = tl.load(flag_ptr + out_row) != 0
            for half in tl.static_range(2):
                own_runs = (visible + (1 << shift) - 1) >> shift
                total = _fold(sums + half, own_runs, runs, total_rows * HEAD_DIM, inside, RUNS)
                bits = tl.where(is_nan, 0x7FC0, rounded_bits(total))
                tl.store(out_ptrs + half, tl.where(visible > 0, bits, 0).to(tl.int16), mask=inside)


@triton.jit
def _trip(
    even, odd, words, p_ptrs, v_ptrs, has_next, seen, MASKED: tl.constexpr, TILES: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Take TILES tiles of keys; the words of the next trip are asked for as those of this one are spent."""
    fresh = ()
    for tile in tl.static_range(TILES):
        for i in tl.static_range(TILE // 2):
            pair = TILE // 2 * tile + i
            factors = tl.load(p_ptrs + pair)
            first = factors.to(tl.int32).to(tl.float32, bitcast=True)
            second = (factors >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            low, high = words[2 * pair], words[2 * pair + 1]
            even = _add(second, widen_low(high), even, seen > 2 * pair + 1, MASKED)
            odd = _add(second, widen_high(high), odd, seen > 2 * pair + 1, MASKED)
            even = _add(first, widen_low(low), even, seen > 2 * pair, MASKED)
            odd = _add(first, widen_high(low), odd, seen > 2 * pair, MASKED)
            for key in tl.static_range(2):
                fresh = fresh + (tl.load(v_ptrs[tile] + (2 * i + key) * (HEAD_DIM // 2), mask=has_next),)
    return even, odd, fresh


@triton.jit
def _add(factor, value, total, is_seen, MASKED: tl.constexpr):
    """Take one step of a chain, where the key is seen."""
    step = tl.fma(factor, value, total)
    return tl.where(is_seen, step, total) if MASKED else step


@triton.jit
def _tiles(place, trip, BLOCK_TILES: tl.constexpr, TILES: tl.constexpr):
    """Point to a trip's tiles of V; past the last tile, to the last one."""
    ptrs, last_tile, shared_tiles, blocks_ptr, stride_tile, shared, stride_st, own = place
    found = ()
    for i in tl.static_range(TILES):
        tile = tl.minimum(trip * TILES + i, last_tile)
        in_pool = tile < shared_tiles
        block = tl.load(blocks_ptr + (tile // BLOCK_TILES) * 2, mask=in_pool, other=0) // 2
        offset = block + (tile % BLOCK_TILES) * stride_tile + shared
        found = found + (ptrs + tl.where(in_pool, offset, own + tile * stride_st),)
    return found


@triton.jit
def _fold(sums, runs, most_runs, stride, inside, RUNS: tl.constexpr):
    """Add the run sums of every lane, left to right; RUNS of them are loaded together."""
    total = tl.load(sums, mask=inside & (runs > 0), other=0.0)
    for first in range(1, most_runs, RUNS):
        run_sums = ()
        for i in tl.static_range(RUNS):
            ptrs = sums + (first + i) * stride
            run_sums = run_sums + (tl.load(ptrs, mask=inside & (first + i < runs), other=0.0),)
        for i in tl.static_range(RUNS):
            total = tl.where(first + i < runs, total + run_sums[i], total)
    return total
