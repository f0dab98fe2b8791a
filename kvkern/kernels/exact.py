"""Exact attention in Triton: contract part A over packed tiles, in four launches.

    score    t = RNE16(RNE16(RNE16(q k) c) + 0)      a program: rows of one reader, one KV head, some tiles
    softmax  max, exp, 16-lane sum, p                a program: one row
    output   one chain per (row, channel, run)       a program: rows of one reader, some channels, one run of keys
    fold     run sums added left to right, RNE16     a program: rows of one reader, all channels

Bits depend on q, K and V by position, sm_scale and key_run alone. A program owns whole chains, and lanes never meet,
except in the max, which has no order, and in halve16. Two neighbouring bf16 travel in one 32-bit word: keys in a K
tile, channels in a V tile, channels in q, keys in p. Critical paths: score, head_dim dependent fmas; softmax, keys / 16
dependent adds; output, 512 (or 1,024) dependent fmas; fold, one add per run. No kernel divides by a number that is not
known when it is compiled, because some targets divide integers by floating point. Rows are tuples of tensors over
lanes, and q and p are scalars: a tensor of two axes would get layouts that differ from load to load in some versions of
Triton, with a barrier for each conversion.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.primitives import (
    INFINITY_KEY,
    MINUS_INFINITY_KEY,
    exp_c,
    from_order_key,
    halve16,
    high_half,
    log_n,
    order_key,
    round16,
    widen_high,
    widen_low,
)

TILE = tl.constexpr(64)


@triton.jit
def score_kernel(
    q_ptr,  # [B, Hq, Tq, D / 2] words of two channels
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    t_ptr,  # [rows, key_capacity / 2] words of two keys
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,  # words
    suffix_start: tl.int64, stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words; K of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    max_blocks, num_rows, max_query_len, first_query,
    key_capacity: tl.int64,
    sm_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Score ROWS rows against 2 * WORDS keys."""
    block, b, kv_head = tl.program_id(0), tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(reader_prefix_ptr + b)
    shared_tiles = tl.load(prefix_len_ptr + prefix) // TILE
    keys = tl.load(prefix_len_ptr + prefix) + tl.load(suffix_len_ptr + b)
    first_word = tl.program_id(2) * WORDS
    last_row = tl.minimum(block * ROWS + ROWS, num_rows) - 1
    most = keys - (max_query_len - 1 - (first_query + last_row // GROUP))
    if 2 * first_word < most:
        word = first_word + tl.arange(0, WORDS)
        tile = tl.minimum(word // (TILE // 2), (keys - 1) // TILE)  # lanes past the last key read what nobody sees
        in_pool = tile < shared_tiles
        entry = (prefix * max_blocks + tl.minimum(tile // BLOCK_TILES, max_blocks - 1)).to(tl.int64) * 2
        pool_offset = tl.load(table_ptr + entry, mask=in_pool, other=0) // 2
        pool_offset += (tile % BLOCK_TILES) * stride_tile + layer_offset + kv_head * (HEAD_DIM * TILE // 2)
        suffix_offset = suffix_start + b * stride_sb + kv_head * stride_sh + (tile - shared_tiles) * stride_st
        k_ptrs = pool_ptr + tl.where(in_pool, pool_offset, suffix_offset) + word % (TILE // 2)

        q_starts = ()
        even = ()
        odd = ()
        for r in tl.static_range(ROWS):
            real = tl.minimum(block * ROWS + r, num_rows - 1)
            head, query = kv_head * GROUP + real % GROUP, first_query + real // GROUP
            q_starts = q_starts + (q_ptr + b * stride_qb + head * stride_qh + query * stride_qt,)
            even = even + (tl.zeros([WORDS], tl.float32),)
            odd = odd + (tl.zeros([WORDS], tl.float32),)
        words = _words(k_ptrs, word >= 0, TILE // 2, 2 * UNROLL)
        # A loop that carries the next trip's words keeps their loads under way; unrolled, the compiler delays them.
        for start in range(0, HEAD_DIM // 2, UNROLL):
            k_ptrs += UNROLL * TILE
            upcoming = _words(k_ptrs, word * 0 + start + UNROLL < HEAD_DIM // 2, TILE // 2, 2 * UNROLL)
            for i in tl.static_range(UNROLL):
                next_even = ()
                next_odd = ()
                for r in tl.static_range(ROWS):
                    q = tl.load(q_starts[r] + start + i)
                    next_even = next_even + (_pair(q, widen_low(words[2 * i]), widen_low(words[2 * i + 1]), even[r]),)
                    next_odd = next_odd + (_pair(q, widen_high(words[2 * i]), widen_high(words[2 * i + 1]), odd[r]),)
                even = next_even
                odd = next_odd
            words = upcoming
        for r in tl.static_range(ROWS):
            row = block * ROWS + r
            if row < num_rows:
                low = round16(round16(round16(even[r]) * sm_scale) + 0.0)
                high = round16(round16(round16(odd[r]) * sm_scale) + 0.0)
                out_row = tl.program_id(1).to(tl.int64) * num_rows + row
                packed = high_half(low) | (high_half(high) << 16)
                tl.store(t_ptr + out_row * (key_capacity // 2) + word, packed)


@triton.jit
def softmax_kernel(
    t_ptr,  # [rows, key_capacity] int16, scores in, p out, +0 behind the last visible key
    e_ptr,  # [rows, key_capacity] fp32, scratch
    flag_ptr,  # [rows] int32, 1 for a row that is NaN
    lse_ptr,  # [B, Hq, Tq] fp32
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    num_rows, max_query_len, first_query,
    key_capacity: tl.int64,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Turn a row of scores into probabilities: KEYS per pass; in the sum, STEPS loads of 16 keys are under way."""
    row, b, kv_head = tl.program_id(0), tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    program = tl.program_id(1).to(tl.int64) * num_rows + row
    query = first_query + row // GROUP
    visible = _visible(b, query, max_query_len, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr)
    t_row, e_row = t_ptr + program * key_capacity, e_ptr + program * key_capacity
    lane = tl.arange(0, KEYS)

    top = tl.full([KEYS], -0x80000000, tl.int32)
    for start in range(0, visible, KEYS):
        key = start + lane
        bits = tl.load(t_row + key, mask=key < visible, other=0).to(tl.int32) << 16
        top = tl.maximum(top, tl.where(key < visible, order_key(bits), -0x80000000))
    top_key = tl.max(top, axis=0)
    is_nan = (top_key >= INFINITY_KEY) | (top_key <= MINUS_INFINITY_KEY)
    largest = from_order_key(top_key)

    for start in range(0, visible, KEYS):
        key = start + lane
        bits = tl.load(t_row + key, mask=key < visible, other=0).to(tl.int32) << 16
        e = exp_c(bits.to(tl.float32, bitcast=True) - largest)
        tl.store(e_row + key, tl.where((key < visible) & (is_nan == 0), e, 0.0))
    tl.debug_barrier()  # the sum reads what other threads have just written

    sums = tl.zeros([16], tl.float32)
    lane16 = tl.arange(0, 16)
    terms = _words(e_row + lane16, lane16 < visible, 16, STEPS)
    for start in range(16 * STEPS, visible + 16 * STEPS, 16 * STEPS):  # the next terms are on their way meanwhile
        upcoming = _words(e_row + start + lane16, lane16 + start < visible, 16, STEPS)
        for step in tl.static_range(STEPS):
            sums += terms[step]
        terms = upcoming
    total = halve16(sums)
    total = tl.where(total > 0.0, total, 1.0)  # a row that sees nothing, or that is NaN, divides by something
    reciprocal = tl.div_rn(1.0, total)

    for start in range(0, visible, KEYS):
        key = start + lane
        p = round16(tl.load(e_row + key) * reciprocal)
        tl.store(t_row + key, high_half(p).to(tl.int16))
    tl.store(flag_ptr + program, is_nan.to(tl.int32))
    if HAS_LSE:
        nan = tl.full([], 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
        lse = tl.where(is_nan, nan, largest + log_n(total))
        lse = tl.where(visible > 0, lse, float("-inf"))
        head = kv_head * GROUP + row % GROUP
        tl.store(lse_ptr + (b * KV_HEADS * GROUP + head).to(tl.int64) * max_query_len + query, lse)


@triton.jit
def output_kernel(
    t_ptr,  # [rows, key_capacity / 2] words of two p
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    partial_ptr,  # [runs, rows, D] fp32
    suffix_start: tl.int64, stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words; V of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    max_blocks, num_rows, max_query_len, first_query, key_run,
    total_rows: tl.int64, key_capacity: tl.int64,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Chain p and V of ROWS rows and 2 * WORDS channels over one run of keys."""
    block, piece, reader_head = tl.program_id(0), tl.program_id(1) % PIECES, tl.program_id(1) // PIECES
    b, kv_head = reader_head // KV_HEADS, reader_head % KV_HEADS
    prefix = tl.load(reader_prefix_ptr + b)
    shared_tiles = tl.load(prefix_len_ptr + prefix) // TILE
    keys = tl.load(prefix_len_ptr + prefix) + tl.load(suffix_len_ptr + b)
    run_keys = 1 << _run_shift(key_run, tl.load(query_len_ptr + b), keys)
    first_key = tl.program_id(2) * run_keys
    first_row = block * ROWS
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    most = keys - (max_query_len - 1 - (first_query + last_row // GROUP))
    if first_key < most:
        fewest = keys - (max_query_len - 1 - (first_query + first_row // GROUP))
        end_key = tl.minimum(first_key + run_keys, most)
        word = piece * WORDS + tl.arange(0, WORDS)
        lane = tl.minimum(word, HEAD_DIM // 2 - 1)
        p_starts = ()
        even = ()
        odd = ()
        for r in tl.static_range(ROWS):
            real = tl.minimum(first_row + r, num_rows - 1)
            p_row = reader_head.to(tl.int64) * num_rows + real
            p_starts = p_starts + (t_ptr + p_row * (key_capacity // 2),)
            even = even + (tl.zeros([WORDS], tl.float32),)
            odd = odd + (tl.zeros([WORDS], tl.float32),)
        suffix_start += b * stride_sb + kv_head * stride_sh - shared_tiles * stride_st
        start = layer_offset + kv_head * (HEAD_DIM * TILE // 2)
        blocks_ptr = table_ptr + (prefix * max_blocks).to(tl.int64) * 2 + 1
        first_tile, last_tile = first_key // TILE, (end_key - 1) // TILE
        whole_tiles = tl.minimum(fewest, first_key + run_keys) // TILE  # every row sees all keys of the tiles before
        here = _v_offset(first_tile, shared_tiles, blocks_ptr, BLOCK_TILES, stride_tile, start, stride_st, suffix_start)
        words = _words(pool_ptr + here + lane, lane * 0 + first_tile < whole_tiles, HEAD_DIM // 2, TILE)
        next_tile = tl.minimum(first_tile + 1, last_tile)
        there = _v_offset(next_tile, shared_tiles, blocks_ptr, BLOCK_TILES, stride_tile, start, stride_st, suffix_start)
        for tile in range(first_tile, whole_tiles):  # the next tile is on its way while this one computes
            upcoming = _words(pool_ptr + there + lane, lane * 0 + tile + 1 < whole_tiles, HEAD_DIM // 2, TILE)
            later = tl.minimum(tile + 2, last_tile)
            there = _v_offset(later, shared_tiles, blocks_ptr, BLOCK_TILES, stride_tile, start, stride_st, suffix_start)
            for i in tl.static_range(TILE // 2):
                next_even = ()
                next_odd = ()
                for r in tl.static_range(ROWS):
                    p = tl.load(p_starts[r] + tile * (TILE // 2) + i)
                    next_even = next_even + (_pair(p, widen_low(words[2 * i]), widen_low(words[2 * i + 1]), even[r]),)
                    next_odd = next_odd + (_pair(p, widen_high(words[2 * i]), widen_high(words[2 * i + 1]), odd[r]),)
                even = next_even
                odd = next_odd
            words = upcoming
        # A key that a row does not see must not touch its chain (A7); what its slot holds is computed and dropped.
        for part in range(4 * tl.maximum(whole_tiles, first_tile), 4 * last_tile + 4):
            last = part // 4
            place = _v_offset(last, shared_tiles, blocks_ptr, BLOCK_TILES, stride_tile, start, stride_st, suffix_start)
            place += part % 4 * (TILE // 8 * HEAD_DIM)
            rest = _words(pool_ptr + place + lane, lane >= 0, HEAD_DIM // 2, TILE // 4)
            for i in tl.static_range(TILE // 8):
                next_even = ()
                next_odd = ()
                for r in tl.static_range(ROWS):
                    p = tl.load(p_starts[r] + part * (TILE // 8) + i)
                    real = tl.minimum(first_row + r, num_rows - 1)
                    seen = keys - (max_query_len - 1 - (first_query + real // GROUP)) - (part * (TILE // 4) + 2 * i)
                    first_even, second_even = widen_low(rest[2 * i]), widen_low(rest[2 * i + 1])
                    first_odd, second_odd = widen_high(rest[2 * i]), widen_high(rest[2 * i + 1])
                    next_even = next_even + (_masked_pair(p, first_even, second_even, even[r], seen),)
                    next_odd = next_odd + (_masked_pair(p, first_odd, second_odd, odd[r], seen),)
                even = next_even
                odd = next_odd
        inside = word < HEAD_DIM // 2
        for r in tl.static_range(ROWS):
            if first_row + r < num_rows:
                out_row = tl.program_id(2) * total_rows + reader_head.to(tl.int64) * num_rows + first_row + r
                out_ptrs = partial_ptr + out_row * HEAD_DIM + 2 * word
                tl.store(out_ptrs, even[r], mask=inside)
                tl.store(out_ptrs + 1, odd[r], mask=inside)


@triton.jit
def fold_kernel(
    partial_ptr,  # [runs, rows, D] fp32
    flag_ptr,  # [rows] int32
    out_ptr,  # [B, Tq, Hq, D] int16
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    num_rows, max_query_len, first_query, key_run,
    total_rows: tl.int64,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Add the run sums of one row, left to right, and round; RUNS of them are loaded together."""
    row, b, kv_head = tl.program_id(0), tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    program = tl.program_id(1).to(tl.int64) * num_rows + row
    query, head = first_query + row // GROUP, kv_head * GROUP + row % GROUP
    query_len = tl.load(query_len_ptr + b)
    visible = _visible(b, query, max_query_len, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr)
    keys = visible + (max_query_len - 1 - query)
    shift = _run_shift(key_run, query_len, keys)
    runs = (visible + (1 << shift) - 1) >> shift
    channel = tl.arange(0, LANES)
    inside = channel < HEAD_DIM
    ptrs = partial_ptr + program * HEAD_DIM + channel
    has_any = channel * 0 + runs > 0
    total = tl.load(ptrs, mask=inside & has_any, other=0.0)
    for first in range(1, runs, RUNS):
        run_sums = ()
        for i in tl.static_range(RUNS):
            there = inside & (channel * 0 + first + i < runs)
            run_sums = run_sums + (tl.load(ptrs + (first + i) * total_rows * HEAD_DIM, mask=there, other=0.0),)
        for i in tl.static_range(RUNS):
            total = tl.where(channel * 0 + first + i < runs, total + run_sums[i], total)
    bits = high_half(round16(total))
    is_nan = (total != total) | (tl.load(flag_ptr + program) != 0)
    bits = tl.where(is_nan, 0x7FC0, bits)
    bits = tl.where(visible > 0, bits, 0)
    tl.store(out_ptr + b * stride_ob + query * stride_ot + head * stride_oh + channel, bits.to(tl.int16), mask=inside)


@triton.jit
def _pair(factors, first, second, total):
    """Add a pair to a chain, the odd element first; the two factors, equal for all lanes, travel in one word."""
    return tl.fma(widen_low(factors), first, tl.fma(widen_high(factors), second, total))


@triton.jit
def _masked_pair(factors, first, second, total, seen):
    """Add a pair of which only the first `seen` elements belong to the chain."""
    total = tl.where(seen > 1, tl.fma(widen_high(factors), second, total), total)
    return tl.where(seen > 0, tl.fma(widen_low(factors), first, total), total)


@triton.jit
def _words(ptrs, mask, step: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT words that lie `step` apart: a tuple of tensors, so that all of the loads are under way together."""
    words = ()
    for i in tl.static_range(COUNT):
        words = words + (tl.load(ptrs + i * step, mask=mask, other=0),)
    return words


@triton.jit
def _v_offset(tile, shared_tiles, blocks_ptr, BLOCK_TILES: tl.constexpr, stride_tile, start, stride_st, suffix_start):
    """Where a tile of V begins, in words from the pool."""
    in_pool = tile < shared_tiles
    block = tl.load(blocks_ptr + (tile // BLOCK_TILES) * 2, mask=in_pool, other=0) // 2
    place = block + (tile % BLOCK_TILES) * stride_tile + start
    return tl.where(in_pool, place, suffix_start + tile * stride_st)


@triton.jit
def _visible(b, query, max_query_len, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr):
    """Keys that a query sees; 0 for padding."""
    keys = tl.load(prefix_len_ptr + tl.load(reader_prefix_ptr + b)) + tl.load(suffix_len_ptr + b)
    is_real = query >= max_query_len - tl.load(query_len_ptr + b)
    return tl.where(is_real, tl.maximum(keys - (max_query_len - 1 - query), 0), 0).to(tl.int32)


@triton.jit
def _run_shift(key_run, query_len, keys):
    """Binary logarithm of a reader's KEY_RUN, 512 or 1024; 0 is stock's rule."""
    is_long = (key_run == 1024) | ((key_run == 0) & (query_len > 1) & (keys > 1024))
    return tl.where(is_long, 10, 9).to(tl.int32)
