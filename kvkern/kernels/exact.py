"""Exact attention in Triton: contract part A over packed tiles, in three launches, or four for many keys.

    score    t = RNE16(RNE16(RNE16(q k) c) + 0), maxima   a program: rows of one reader, one KV head, some keys
    softmax  exp, 16-lane sum, p                          a program: one row, some keys; the last one adds up
    output   one chain per (row, channel, run)            a program: rows of one reader, some channels, one run of keys;
                                                          the last one adds the run sums, left to right, and rounds

Softmax has no launch of its own kind: programs of either kernel may do it, and come first, as they take longest. With
few keys it is launched alone between scores and output. With many, KV heads go in halves: scores of A; scores of B
beside softmax of A; output of A beside softmax of B; output of B. Then memory is read all the time.

Bits depend on q, K and V by position, sm_scale and key_run alone. A program owns whole chains, and lanes never meet,
except in the max, which has no order, and in halve16; who arrives last does what any other would have done. Two
neighbouring bf16 travel in one 32-bit word: keys in a K tile, channels in a V tile, channels in q. Critical paths:
score, head_dim dependent fmas; softmax, keys / 16 dependent adds; output, 512 (or 1,024) dependent fmas, then one add
per run. No kernel divides by a number that is not known when it is compiled, because some targets divide integers by
floating point. Tensors have one axis: with two, some versions of Triton give them layouts that differ from load to
load, with a barrier for each conversion.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_output import output_run
from kvkern.kernels.exact_score import score_block
from kvkern.kernels.exact_softmax import softmax_part

# No integer is compiled in because it is 1 or a multiple of 16: what the gate compiles is what runs, for any shape.
INTEGERS = [
    "stride_qb", "stride_qh", "stride_qt", "suffix_start", "stride_sb", "stride_sh", "stride_st", "stride_tile",
    "layer_offset", "stride_ob", "stride_ot", "stride_oh", "softmax_programs", "softmax_head", "first_head",
    "max_blocks", "num_rows", "max_query_len", "first_query", "key_run", "has_lse", "total_rows", "key_capacity",
]  # fmt: skip
SCORE_INTEGERS = [name for name in INTEGERS if name not in ("stride_ob", "stride_ot", "stride_oh", "key_run", "total_rows")]
OUTPUT_INTEGERS = [name for name in INTEGERS if name not in ("stride_qb", "stride_qh", "stride_qt")]


@triton.jit(do_not_specialize=SCORE_INTEGERS)
def score_kernel(
    q_ptr,  # [B, Hq, Tq, D / 2] words of two channels
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    t_ptr,  # [rows, key_capacity / 2] words of two scores
    t16_ptr,  # the same as int16
    top_ptr,  # [rows, key_capacity / (2 * WORDS)] int32, order keys of the largest scores
    e_ptr,  # [rows, key_capacity] fp32: exponentials, then p
    flag_ptr,  # [rows] int32, 1 for a row that is NaN
    arrived_ptr,  # [rows, 16] int32, cleared here
    lse_ptr,  # [B, Hq, Tq] fp32
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,  # words
    suffix_start: tl.int64, stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words; K of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    softmax_programs, softmax_head, first_head,
    max_blocks, num_rows, max_query_len, first_query, has_lse,
    key_capacity: tl.int64,
    sm_scale,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TILES: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
    KEYS: tl.constexpr, PASSES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Score HEADS KV heads from `first_head` on, after `softmax_programs` that do softmax of those from `softmax_head`.

    The grid is row blocks, readers and KV heads, then ROWS programs for each part of a row's keys in the softmax, and
    one for each block of keys in the scores.
    """
    block, b, kv_head, z = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS, tl.program_id(2)
    if z < softmax_programs:
        softmax_part(
            block * ROWS + z % ROWS, z // ROWS, b, softmax_head + kv_head, t16_ptr, top_ptr, e_ptr, flag_ptr, lse_ptr,
            arrived_ptr, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
            num_rows, max_query_len, first_query, key_capacity, has_lse, KV_HEADS, GROUP, WORDS, KEYS, PASSES, STEPS,
        )  # fmt: skip
    else:
        score_block(
            block, z - softmax_programs, b, first_head + kv_head, q_ptr, pool_ptr, table_ptr,
            prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, t_ptr, top_ptr, arrived_ptr,
            stride_qb, stride_qh, stride_qt, suffix_start, stride_sb, stride_sh, stride_st, stride_tile, layer_offset,
            max_blocks, num_rows, max_query_len, first_query, key_capacity, sm_scale,
            KV_HEADS, GROUP, ROWS, HEAD_DIM, BLOCK_TILES, WORDS, UNROLL,
        )  # fmt: skip


@triton.jit(do_not_specialize=OUTPUT_INTEGERS)
def output_kernel(
    p_ptr,  # [rows, key_capacity / 2] int64, pairs of p: e_ptr's memory
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    t16_ptr, top_ptr, e_ptr, flag_ptr, arrived_ptr, lse_ptr,  # as in score_kernel
    partial_ptr,  # [runs, rows, D] fp32
    out_ptr,  # [B, Tq, Hq, D] int16
    suffix_start: tl.int64, stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words; V of the suffixes
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    softmax_programs, softmax_head, first_head,
    max_blocks, num_rows, max_query_len, first_query, has_lse, key_run,
    total_rows: tl.int64, key_capacity: tl.int64,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TILES: tl.constexpr, WORDS: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr, RUNS: tl.constexpr,
    SCORE_WORDS: tl.constexpr, KEYS: tl.constexpr, PASSES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write out of HEADS KV heads from `first_head` on, after `softmax_programs` as in `score_kernel`.

    Then the grid's last axis is runs, each with PIECES pieces of the channels.
    """
    block, b, kv_head, z = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS, tl.program_id(2)
    if z < softmax_programs:
        softmax_part(
            block * ROWS + z % ROWS, z // ROWS, b, softmax_head + kv_head, t16_ptr, top_ptr, e_ptr, flag_ptr, lse_ptr,
            arrived_ptr, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
            num_rows, max_query_len, first_query, key_capacity, has_lse,
            KV_HEADS, GROUP, SCORE_WORDS, KEYS, PASSES, STEPS,
        )  # fmt: skip
    else:
        output_run(
            block, (z - softmax_programs) // PIECES, (z - softmax_programs) % PIECES, b, first_head + kv_head,
            p_ptr, pool_ptr, table_ptr, partial_ptr, flag_ptr, out_ptr, arrived_ptr,
            prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,
            suffix_start, stride_sb, stride_sh, stride_st, stride_tile, layer_offset, stride_ob, stride_ot, stride_oh,
            max_blocks, num_rows, max_query_len, first_query, key_run, total_rows, key_capacity,
            KV_HEADS, GROUP, ROWS, HEAD_DIM, BLOCK_TILES, WORDS, TILES, RUNS,
        )  # fmt: skip
