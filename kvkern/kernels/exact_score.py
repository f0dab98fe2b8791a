"""Scores of the contract (A1): one chain per row and key, and the largest score of each row among a program's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_rows import add_pair, all_keys, load_words
from kvkern.kernels.primitives import NAN_KEY, order_key, round16, widen_high, widen_low

TILE = tl.constexpr(64)
COUNTERS = tl.constexpr(16)
"""Counters of a row: one of its softmax, and one of each piece of its output, of which there are 8 at most."""


# No integer is compiled in because it is 1 or a multiple of 16: what the gate compiles is what runs, for any shape.
INTEGERS = [
    "stride_qb", "stride_qh", "stride_qt", "suffix_start", "stride_sb", "stride_sh", "stride_st", "stride_tile",
    "layer_offset", "max_blocks", "num_rows", "max_query_len", "first_query", "key_capacity",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def score_kernel(
    q_ptr,  # [B, Hq, Tq, D / 2] words of two channels
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr,  # int32
    t_ptr,  # [rows, key_capacity / 2] words of two scores
    top_ptr,  # [rows, key_capacity / (2 * WORDS)] int32, order keys of the largest scores
    arrived_ptr,  # [rows, COUNTERS] int32, cleared here
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,  # words
    suffix_start: tl.int64, stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words; K of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    max_blocks, num_rows, max_query_len, first_query,
    key_capacity: tl.int64,
    sm_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Score ROWS rows against 2 * WORDS keys, and leave the largest score of each row."""
    block, part = tl.program_id(0), tl.program_id(2)
    b, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    prefix = tl.load(reader_prefix_ptr + b)
    shared_tiles = tl.load(prefix_len_ptr + prefix) // TILE
    keys = all_keys(b, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr)
    first_word = part * WORDS
    first_out = tl.program_id(1).to(tl.int64) * num_rows + block * ROWS
    last_row = tl.minimum(block * ROWS + ROWS, num_rows) - 1
    most = keys - (max_query_len - 1 - (first_query + last_row // GROUP))
    if part == 0:  # the counters of these rows, which later launches count on
        for r in tl.static_range(ROWS):
            if block * ROWS + r < num_rows:
                tl.store(arrived_ptr + (first_out + r) * COUNTERS + tl.arange(0, COUNTERS), 0)
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
                packed = ((low >> 16) & 0xFFFF) | (high & -65536)
                tl.store(t_ptr + (first_out + r) * (key_capacity // 2) + word, packed)
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
