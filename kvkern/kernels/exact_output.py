"""Output of the contract (A5): one chain per row, channel and run of keys; the last run to arrive adds the run sums."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_rows import all_keys, first_of, pull, run_shift, second_of, visible_keys, warm
from kvkern.kernels.exact_tickets import COUNTERS, READY, SCORED, arrive, await_count, wait_for
from kvkern.kernels.primitives import load_rows, rounded_bits, widen_high, widen_low

TILE = tl.constexpr(64)
PAIRS = tl.constexpr(16)
"""Of p, loaded together: 32 keys. Loads end 128 bytes behind a run, in the scratch."""


@triton.jit
def output(
    pairs_ptr, pool_ptr, table_ptr, readers, partial_ptr, flag_ptr, counters_ptr, out_ptr, suffix_v, tiles, out_strides,
    rows, key_run, total_rows, key_capacity, score_programs, block, b, part, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr, RUNS: tl.constexpr, WAITS: tl.constexpr,
    PULL: tl.constexpr, WARM: tl.constexpr,
):  # fmt: skip
    """Chain p and V of ROWS rows and 2 * WORDS channels over one run; a lane has one row and two channels.

    Arguments as in `exact_kernel`.
    """
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr = readers
    suffix_start, stride_sb, stride_sh, stride_st = suffix_v
    stride_tile, layer_offset, max_blocks = tiles
    stride_ob, stride_ot, stride_oh = out_strides
    num_rows, max_query_len, first_query = rows
    reader_head, run, piece = b * KV_HEADS + kv_head, part // PIECES, part % PIECES
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
        out_row = reader_head.to(tl.int64) * num_rows + row
        fewest = keys - (max_query_len - 1 - (first_query + first_row // GROUP))
        end_key = tl.minimum(first_key + (1 << shift), most)
        first, end = first_key // (TILES * TILE), (end_key + TILES * TILE - 1) // (TILES * TILE)
        blocks_ptr = table_ptr + (prefix * max_blocks).to(tl.int64) * 2 + 1
        shared = layer_offset + kv_head * (HEAD_DIM * TILE // 2)
        own = suffix_start + b * stride_sb + kv_head * stride_sh - shared_tiles * stride_st
        place = (tl.maximum(end_key - 1, 0) // TILE, shared_tiles, blocks_ptr, stride_tile, shared, stride_st, own)
        offsets = _offsets(place, first, BLOCK_TILES, TILES)
        of_head = counters_ptr + reader_head.to(tl.int64) * num_rows * COUNTERS
        if WAITS:
            await_count(of_head + SCORED, score_programs)  # until then the memory is busy with K
        if PULL:
            first_tile = first_key // TILE
            _pull_run(place, pool_ptr, first_tile, end_key, piece, lane, HEAD_DIM, BLOCK_TILES, PIECES, ROWS * WORDS)
        v_ptrs = pool_ptr + tl.minimum(word, HEAD_DIM // 2 - 1)
        p_ptrs = pairs_ptr + out_row * (key_capacity // 2)
        even, odd = tl.zeros([ROWS * WORDS], tl.float32), tl.zeros([ROWS * WORDS], tl.float32)
        factors = ()
        for _ in tl.static_range(PAIRS):
            factors = factors + (tl.zeros([ROWS * WORDS], tl.int64),)
        words = ()
        for _ in tl.static_range(TILES * TILE):
            words = words + (tl.zeros([ROWS * WORDS], tl.int32),)
        # Each word of V is asked for when the one that it replaces has been spent. The first trip only asks, before p
        # is there: what it computes, from whatever lies in its place, is dropped.
        for trip in range(first - 1, tl.where(end_key > first_key, end, first - 1)):  # no keys, no tile to ask for
            p_here = p_ptrs + tl.maximum(trip, first) * (TILES * TILE // 2)
            if trip == first:
                if WAITS:
                    wait_for(of_head + READY, num_rows)
                if WARM:
                    _warm_run(p_ptrs + first_key // 2, lane % WORDS, end_key - first_key, WORDS)
                factors = load_rows(p_here, None, 1, PAIRS)
            if (trip + 1) * (TILES * TILE) > fewest:
                seen = keys - (max_query_len - 1 - (first_query + row // GROUP))
                words = _hide(words, seen - trip * (TILES * TILE), TILES)
            v_next, offsets = offsets, _offsets(place, trip + 2, BLOCK_TILES, TILES)
            fresh = ()
            for tile in tl.static_range(TILES):
                for start in tl.static_range(0, TILE, 2 * PAIRS):
                    upcoming = load_rows(p_here + (TILE * tile + start + 2 * PAIRS) // 2, None, 1, PAIRS)
                    for i in tl.static_range(0, 2 * PAIRS, 2):
                        low, high = words[TILE * tile + start + i], words[TILE * tile + start + i + 1]
                        if i < PAIRS:  # neighbours in p are 16 keys apart
                            one, two = first_of(factors[i]), first_of(factors[i + 1])
                        else:
                            one, two = second_of(factors[i - PAIRS]), second_of(factors[i - PAIRS + 1])
                        even = tl.fma(one, widen_low(low), tl.fma(two, widen_low(high), even))
                        odd = tl.fma(one, widen_high(low), tl.fma(two, widen_high(high), odd))
                        ptrs = v_ptrs + v_next[tile] + (start + i) * (HEAD_DIM // 2)
                        fresh = fresh + load_rows(ptrs, None, HEAD_DIM // 2, 2)  # after the last trip, its tiles again
                    factors = upcoming
            words = fresh
            even, odd = tl.where(trip < first, 0.0, even), tl.where(trip < first, 0.0, odd)
        inside = (word < HEAD_DIM // 2) & (first_row + lane // WORDS < num_rows)
        sums = partial_ptr + out_row * (HEAD_DIM // 2) + word
        low, high = even.to(tl.int32, bitcast=True).to(tl.int64), odd.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(sums + run * total_rows * (HEAD_DIM // 2), (low & 0xFFFFFFFF) | (high << 32), mask=inside)
        runs = tl.maximum((most + (1 << shift) - 1) >> shift, 1)
        first_out = reader_head.to(tl.int64) * num_rows + first_row
        if arrive(counters_ptr + first_out * COUNTERS + 1 + piece) == runs - 1:
            query, head = first_query + row // GROUP, kv_head * GROUP + row % GROUP
            visible = visible_keys(keys, query, query_len, max_query_len)
            out_ptrs = out_ptr + b * stride_ob + query * stride_ot + head * stride_oh + 2 * word
            is_nan = tl.load(flag_ptr + out_row) != 0
            own_runs = (visible + (1 << shift) - 1) >> shift
            even, odd = _fold(sums, own_runs, runs, total_rows * (HEAD_DIM // 2), inside, RUNS)
            for half in tl.static_range(2):
                bits = tl.where(is_nan, 0x7FC0, rounded_bits(odd if half else even))
                tl.store(out_ptrs + half, tl.where(visible > 0, bits, 0).to(tl.int16), mask=inside)


@triton.jit
def _pull_run(
    place, pool_ptr, first, end_key, piece, lane, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    PIECES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Ask the L2 for the tiles of a run, every PIECES-th of them; a warp asks for one at a time."""
    ABREAST: tl.constexpr = LANES // 32 if LANES >= 32 else 1
    for start in range(first, (end_key + TILE - 1) // TILE, PIECES * ABREAST):
        tile = start + (lane // 32) * PIECES + piece
        wanted = (lane % 32 == 0) & (tile * TILE < end_key)
        pull(pool_ptr + _tile_offset(place, tile, BLOCK_TILES), wanted, HEAD_DIM * TILE * 2)


@triton.jit
def _warm_run(p_ptrs, lane, keys, LANES: tl.constexpr):
    """Ask the L1 for a row's p of a run, a line a lane: every line is used for 32 keys, and waited for but once."""
    for start in range(0, keys, LANES * 2 * PAIRS):
        key = start + lane * (2 * PAIRS)
        warm(p_ptrs + key // 2, key < keys)


@triton.jit
def _hide(words, seen, TILES: tl.constexpr):
    """Put +0 where a row does not see a key. As p is -0 there, the chain stays as it is (A7)."""
    hidden = ()
    for i in tl.static_range(TILES * TILE):
        hidden = hidden + (tl.where(seen > i, words[i], 0),)
    return hidden


@triton.jit
def _offsets(place, trip, BLOCK_TILES: tl.constexpr, TILES: tl.constexpr):
    """Where the tiles of a trip begin."""
    offsets = ()
    for i in tl.static_range(TILES):
        offsets = offsets + (_tile_offset(place, trip * TILES + i, BLOCK_TILES),)
    return offsets


@triton.jit
def _tile_offset(place, tile, BLOCK_TILES: tl.constexpr):
    """Where a tile of V begins, in words from the pool; past the last tile, where that one does."""
    last_tile, shared_tiles, blocks_ptr, stride_tile, shared, stride_st, own = place
    tile = tl.minimum(tile, last_tile)
    in_pool = tile < shared_tiles
    block = tl.load(blocks_ptr + (tile // BLOCK_TILES) * 2, mask=in_pool, other=0) // 2
    return tl.where(in_pool, block + (tile % BLOCK_TILES) * stride_tile + shared, own + tile * stride_st)


@triton.jit
def _fold(sums, runs, most_runs, stride, inside, RUNS: tl.constexpr):
    """Add the run sums of every lane, left to right; RUNS of them are loaded together."""
    pair = tl.load(sums, mask=inside & (runs > 0), other=0)
    even, odd = first_of(pair), second_of(pair)
    for start in range(1, most_runs, RUNS):
        pairs = ()
        for i in tl.static_range(RUNS):
            ptrs = sums + (start + i) * stride
            pairs = pairs + (tl.load(ptrs, mask=inside & (start + i < runs), other=0),)
        for i in tl.static_range(RUNS):
            even = tl.where(start + i < runs, even + first_of(pairs[i]), even)
            odd = tl.where(start + i < runs, odd + second_of(pairs[i]), odd)
    return even, odd
