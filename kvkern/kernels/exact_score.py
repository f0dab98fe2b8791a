"""Scores of the contract (A1): one chain per row and key, and the largest score of each row among a program's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_rows import add_pair, all_keys, load_words, place_of, pull, warm
from kvkern.kernels.primitives import NAN_KEY, order_key, round16, widen_high, widen_low

TILE = tl.constexpr(64)


@triton.jit
def score(
    q_ptr, pool_ptr, table_ptr, readers, t_ptr, top_ptr, q_strides, suffix_k, tiles, rows, key_capacity, sm_scale,
    block, b, part, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, UNROLL: tl.constexpr, PULL: tl.constexpr, WARM: tl.constexpr,
):  # fmt: skip
    """Score ROWS rows against 2 * WORDS keys, and leave the largest score of each row; arguments as in `exact_kernel`.

    `top_ptr`: `[rows, key_capacity / (2 * WORDS)]`.
    """
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr = readers[0], readers[1], readers[2]
    stride_qb, stride_qh, stride_qt = q_strides
    suffix_start, stride_sb, stride_sh, stride_st = suffix_k
    stride_tile, layer_offset, max_blocks = tiles
    num_rows, max_query_len, first_query = rows
    prefix = tl.load(reader_prefix_ptr + b)
    shared_tiles = tl.load(prefix_len_ptr + prefix) // TILE
    keys = all_keys(b, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr)
    first_word = part * WORDS
    first_out = (b * KV_HEADS + kv_head).to(tl.int64) * num_rows + block * ROWS
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
        tiles_at = pool_ptr + tl.where(in_pool, pool_offset, suffix_offset)
        if PULL:
            pull(tiles_at, (word % (TILE // 2) == 0) & (2 * word < keys), HEAD_DIM * TILE * 2)
        k_ptrs = tiles_at + word % (TILE // 2)

        q_starts = ()
        even = ()
        odd = ()
        for r in tl.static_range(ROWS):
            real = tl.minimum(block * ROWS + r, num_rows - 1)
            head, query = kv_head * GROUP + real % GROUP, first_query + real // GROUP
            q_starts = q_starts + (q_ptr + b * stride_qb + head * stride_qh + query * stride_qt,)
            if WARM:
                line = 32 * tl.arange(0, WORDS)
                warm(q_starts[r] + line, line < HEAD_DIM // 2)
            even = even + (tl.zeros([WORDS], tl.float32),)
            odd = odd + (tl.zeros([WORDS], tl.float32),)
        words = ()
        for _ in tl.static_range(2 * UNROLL):
            words = words + (tl.zeros([WORDS], tl.int32),)
        # A loop that carries the next trip's words keeps their loads under way; unrolled, the compiler delays them.
        # Its end, HEAD_DIM / 2, is written so that no compiler knows it.
        for start in range(-UNROLL, tl.minimum(HEAD_DIM // 2, most + HEAD_DIM), UNROLL):
            upcoming = load_words(k_ptrs, word * 0 + start + UNROLL < HEAD_DIM // 2, TILE // 2, 2 * UNROLL)
            k_ptrs += UNROLL * TILE
            if start >= 0:  # the first trip only asks for words
                for i in tl.static_range(UNROLL):
                    next_even = ()
                    next_odd = ()
                    for r in tl.static_range(ROWS):
                        q = tl.load(q_starts[r] + start + i)
                        low, high = words[2 * i], words[2 * i + 1]
                        next_even = next_even + (add_pair(q, widen_low(low), widen_low(high), even[r]),)
                        next_odd = next_odd + (add_pair(q, widen_high(low), widen_high(high), odd[r]),)
                    even = next_even
                    odd = next_odd
            words = upcoming
        for r in tl.static_range(ROWS):
            row = block * ROWS + r
            if row < num_rows:
                low, high = score_bits(even[r], sm_scale), score_bits(odd[r], sm_scale)
                t_row = t_ptr + (first_out + r) * key_capacity
                tl.store(t_row + place_of(2 * word), low.to(tl.float32, bitcast=True))
                tl.store(t_row + place_of(2 * word + 1), high.to(tl.float32, bitcast=True))
                seen = keys - (max_query_len - 1 - (first_query + row // GROUP))
                top = tl.where(2 * word < seen, order_key(low), -0x80000000)
                top = tl.maximum(top, tl.where(2 * word + 1 < seen, order_key(high), -0x80000000))
                tl.store(top_ptr + (first_out + r) * (key_capacity // (2 * WORDS)) + part, tl.max(top, axis=0))


@triton.jit
def score_bits(total, sm_scale):
    """Round a chain to a score, as bits; NaN is chosen, as a GPU makes it 0x7fffffff and rounding that gives -0."""
    scaled = round16(total) * sm_scale
    bits = round16(round16(scaled) + 0.0).to(tl.int32, bitcast=True)
    return tl.where((total != total) | (scaled != scaled), NAN_KEY, bits)
