"""Exact attention in Triton: contract part A over packed tiles, in one launch.

    score    t = RNE16(RNE16(RNE16(q k) c) + 0), maxima   an item: rows of one reader, one KV head, some keys
    softmax  exp, then 16-lane sum and p                  an item: one row, some keys; the last one sums the row
    output   one chain per (row, channel, run), then the  an item: rows of one reader, some channels, one run of
             run sums added left to right, RNE16          keys; the last one adds the run sums

Bits depend on q, K and V by position, sm_scale and key_run alone. A program owns whole chains, and lanes never meet,
except in the max, which has no order, and in halve16; who arrives last does what any other would have done, with what
all of them have left. Which program does what, and when, is `exact_tickets`. Two neighbouring bf16 travel in one
32-bit word: keys in a K tile, channels in a V tile, channels in q. A row's scores, exponentials and p take each
other's place, as fp32, and travel in pairs of keys 16 apart, which are neighbours there (`place_of`). Critical paths:
score, head_dim dependent fmas; softmax, keys / 16 dependent adds; output, 512 (or 1,024) dependent fmas, then one add
per run. No kernel divides by a number that is not known when it is compiled, because some targets divide integers by
floating point. Tensors have one axis: with two, some versions of Triton give them layouts that differ from load to
load, with a barrier for each conversion. Loops that carry words ask for them in a first trip that computes nothing:
each load that is written out twice costs the compiler seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvkern.contract import KEY_RUN, TILE_TOKENS
from kvkern.errors import LayoutError
from kvkern.kernels.exact_output import output
from kvkern.kernels.exact_rows import warm
from kvkern.kernels.exact_score import score
from kvkern.kernels.exact_softmax import softmax
from kvkern.kernels.exact_tickets import (
    COUNTERS,
    READY,
    SCORED,
    TICKETS,
    arrive,
    divide,
    item_of,
    leave,
    magic,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ExactConfig


MOST_ITEMS = 1 << 22
"""Of a KV head, as `divide` divides numbers below."""


@dataclass(frozen=True)
class ScratchLayout:
    """Where the arrays of a call lie in its scratch, in bytes; functions of shapes alone.

    Counters come first: `[rows, 16]` int32, 0 before and after every call.

    Attributes:
        counter_bytes: of the counters.
        key_capacity: keys of a row in `e`.
        runs: rows of `partial`.
        e: scores, then exponentials, then p: `[rows, key_capacity]` fp32.
        partial: `[runs, rows, head_dim]` fp32.
        top: order keys of largest scores: `[rows, key_capacity / (2 * score_words)]` int32.
        flag: `[rows]` int32.
        nbytes: all of it.
    """

    counter_bytes: int
    key_capacity: int
    runs: int
    e: int
    partial: int
    top: int
    flag: int
    nbytes: int


def scratch_layout(rows: int, head_dim: int, tile_capacity: int, config: ExactConfig) -> ScratchLayout:
    """Lay out the scratch of a call.

    Args:
        rows: query rows of all readers and heads in one slice of Tq.
        head_dim: channels.
        tile_capacity: tiles that a reader may have: those of the block table and those of its suffix.
        config: whose passes the capacity must be a multiple of.
    """
    step = max(config.softmax_keys, 2 * config.score_words, KEY_RUN)  # all of them powers of two
    keys = -(-max(tile_capacity, 1) * TILE_TOKENS // step) * step
    runs = -(-keys // KEY_RUN)
    tops = keys // (2 * config.score_words)
    sizes = [
        rows * COUNTERS.value * 4,
        rows * keys * 4,
        runs * rows * head_dim * 4,
        rows * tops * 4,
        rows * 4,
    ]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    return ScratchLayout(sizes[0], keys, runs, *starts[1:])


def launch(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    lengths: tuple[Tensor, Tensor, Tensor, Tensor],
    pool: Tensor,
    place: tuple[Tensor, int, int, int],
    suffix_k: Tensor,
    suffix_v: Tensor,
    scratch: Tensor,
    layout: ScratchLayout,
    queries: tuple[int, int],
    sm_scale: float,
    key_run: int,
    config: ExactConfig,
) -> None:
    """Launch what some query positions need; tensors as in `triton_door.attend`.

    Args:
        q: all positions.
        out: all positions.
        lse: all positions, or None.
        lengths: prefix_len, reader_prefix, suffix_len and query_len.
        pool: anchor of all tiles.
        place: block table, tiles of a block, and in elements the stride of a tile and the layer's offset.
        suffix_k: keys of the suffixes.
        suffix_v: values of the suffixes.
        scratch: uint8, its counters 0.
        layout: of the scratch.
        queries: the first position and how many.
        sm_scale: factor of the scores.
        key_run: 512, 1024, or 0 for stock's rule.
        config: no bit depends on it.
    """
    batch, num_q_heads, max_query_len, head_dim = q.shape
    kv_heads = suffix_k.shape[1]
    group, (first_query, count), capacity = num_q_heads // kv_heads, queries, layout.key_capacity
    table, block_tiles, stride_tile, layer_offset = place
    num_rows, words = group * count, pool.view(torch.int32)

    def array(start: int, dtype: torch.dtype) -> Tensor:
        return scratch[start:].view(dtype)

    e = array(layout.e, torch.float32)
    top, flag, counters = (array(start, torch.int32) for start in (layout.top, layout.flag, 0))
    strides = [stride // 2 for stride in (*suffix_k.stride()[:3], stride_tile, layer_offset)]
    suffix_starts = [(suffix.data_ptr() - pool.data_ptr()) // 4 for suffix in (suffix_k, suffix_v)]
    score_rows = min(config.score_rows, num_rows)
    output_rows, output_words, pieces = config.output_shape(num_rows, head_dim)
    score_blocks, output_blocks = -(-num_rows // score_rows), -(-num_rows // output_rows)
    score_parts = capacity // (2 * config.score_words)
    items = (
        batch * score_blocks * score_parts,
        batch * num_rows * -(-capacity // (config.softmax_keys * config.softmax_passes)),
        batch * output_blocks * pieces * layout.runs,
    )
    if max(items) >= MOST_ITEMS or max(items) * max(batch, num_rows) >= 1 << 40:
        raise LayoutError(
            f"{max(items):,} items of a KV head: too many readers, query positions and keys for one call; split the "
            "batch, or give less scratch"
        )
    waits = config.launches == 1
    for sizes in (items,) if waits else ((items[0], 0, 0), (0, items[1], 0), (0, 0, items[2])):
        exact_kernel[(kv_heads * sum(sizes),)](
            q.view(torch.int32), words, table, *lengths, top, e, e.view(torch.int64), flag,
            e if lse is None else lse, array(layout.partial, torch.int64),
            out.view(torch.int16), counters, *(stride // 2 for stride in q.stride()[:3]), *suffix_starts, *strides,
            *out.stride()[:3], table.shape[1], num_rows, max_query_len, first_query, int(lse is not None), key_run,
            batch * kv_heads * num_rows, capacity, *sizes, batch, score_blocks, output_blocks, score_parts,
            *(magic(divisor) for divisor in (batch, num_rows, score_blocks, output_blocks)), sm_scale,
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_TILES=block_tiles,
            SCORE_ROWS=score_rows, SCORE_WORDS=config.score_words, UNROLL=config.score_unroll_for(head_dim),
            KEYS=config.softmax_keys, PASSES=config.softmax_passes, STEPS=config.softmax_steps,
            OUTPUT_ROWS=output_rows, OUTPUT_WORDS=output_words, PIECES=pieces, TILES=config.output_tiles,
            RUNS=config.fold_runs, LAG=min(config.lag, kv_heads), WAITS=waits,
            PULL=config.pull, WARM=config.warm,
            num_warps=config.warps, enable_fp_fusion=False, **config.options,
        )  # fmt: skip


# No integer is compiled in because it is 1 or a multiple of 16: what the gate compiles is what runs, for any shape.
INTEGERS = [
    "stride_qb", "stride_qh", "stride_qt", "suffix_k_start", "suffix_v_start", "stride_sb", "stride_sh", "stride_st",
    "stride_tile", "layer_offset", "stride_ob", "stride_ot", "stride_oh", "max_blocks", "num_rows", "max_query_len",
    "first_query", "has_lse", "key_run", "total_rows", "key_capacity", "score_items", "softmax_items", "output_items",
    "batch", "score_blocks", "output_blocks", "score_parts", "by_batch", "by_rows", "by_score_blocks",
    "by_output_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def exact_kernel(
    q_ptr,  # [B, Hq, Tq, D / 2] words of two channels
    pool_ptr,  # words; all tiles are addressed from here
    table_ptr,  # [P, max_blocks, 2] int64, offsets in bf16 elements
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr,  # int32
    top_ptr,  # [rows, key_capacity / (2 * SCORE_WORDS)] int32, order keys of the largest scores of a program
    e_ptr,  # [rows, key_capacity] fp32: scores, then exponentials, then p, each at its key's `place_of`
    pairs_ptr,  # the same, [rows, key_capacity / 2] int64: what keys 16 apart have
    flag_ptr,  # [rows] int32, 1 for a row that is NaN
    lse_ptr,  # [B, Hq, Tq] fp32
    partial_ptr,  # [runs, rows, D / 2] int64, run sums: pairs of fp32
    out_ptr,  # [B, Tq, Hq, D] int16
    counters_ptr,  # [rows, COUNTERS] int32, 0 before and after
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int64,  # words
    suffix_k_start: tl.int64, suffix_v_start: tl.int64,  # words from the pool
    stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,  # words
    stride_tile: tl.int64, layer_offset: tl.int64,  # words
    stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    max_blocks, num_rows, max_query_len, first_query, has_lse, key_run,
    total_rows: tl.int64, key_capacity: tl.int64,
    score_items, softmax_items, output_items,  # of a KV head
    batch, score_blocks, output_blocks, score_parts,
    by_batch: tl.int64, by_rows: tl.int64, by_score_blocks: tl.int64, by_output_blocks: tl.int64,
    sm_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr,
    SCORE_ROWS: tl.constexpr, SCORE_WORDS: tl.constexpr, UNROLL: tl.constexpr,
    KEYS: tl.constexpr, PASSES: tl.constexpr, STEPS: tl.constexpr,
    OUTPUT_ROWS: tl.constexpr, OUTPUT_WORDS: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr,
    RUNS: tl.constexpr, LAG: tl.constexpr, WAITS: tl.constexpr, PULL: tl.constexpr,
    WARM: tl.constexpr,
):  # fmt: skip
    """Do one item."""
    readers = (prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr)
    if WARM:  # what all programs read first, while they draw their tickets
        lane = tl.arange(0, 32)
        for i in tl.static_range(4):
            warm(readers[i] + lane, lane == 0)
        warm(table_ptr + 16 * lane, 8 * lane < max_blocks)
    ticket = tl.program_id(0)
    if WAITS:
        ticket = tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed", scope="gpu")
    sizes = (score_items, softmax_items, output_items)
    phase, kv_head, item = item_of(ticket, sizes, KV_HEADS, LAG)
    rows, tiles = (num_rows, max_query_len, first_query), (stride_tile, layer_offset, max_blocks)
    # Of the items of a head, rows are neighbours, then readers, who may share what they read; keys come last.
    width = tl.where(phase == 0, score_blocks, tl.where(phase == 1, num_rows, output_blocks))
    by_width = tl.where(phase == 0, by_score_blocks, tl.where(phase == 1, by_rows, by_output_blocks))
    rest = divide(item, by_width)
    block = item - rest * width
    part = divide(rest, by_batch)
    b = rest - part * batch
    of_head = counters_ptr + (b * KV_HEADS + kv_head).to(tl.int64) * num_rows * COUNTERS
    score_programs = score_blocks * score_parts
    if phase == 0:
        score(
            q_ptr, pool_ptr, table_ptr, readers, e_ptr, top_ptr, (stride_qb, stride_qh, stride_qt),
            (suffix_k_start, stride_sb, stride_sh, stride_st), tiles, rows, key_capacity, sm_scale,
            block, b, part, kv_head,
            KV_HEADS, GROUP, SCORE_ROWS, HEAD_DIM, BLOCK_TILES, SCORE_WORDS, UNROLL, PULL, WARM,
        )  # fmt: skip
        if WAITS:
            arrive(of_head + SCORED)
    elif phase == 1:
        is_ready = softmax(
            top_ptr, e_ptr, pairs_ptr, flag_ptr, lse_ptr, counters_ptr, readers, rows, has_lse, key_capacity,
            score_programs, block, b, part, kv_head,
            KV_HEADS, GROUP, SCORE_WORDS, KEYS, PASSES, STEPS, WAITS,
        )  # fmt: skip
        if WAITS:  # noqa: SIM102 - known when compiled
            if is_ready:
                arrive(of_head + READY)
    else:
        output(
            pairs_ptr, pool_ptr, table_ptr, readers, partial_ptr, flag_ptr, counters_ptr, out_ptr,
            (suffix_v_start, stride_sb, stride_sh, stride_st), tiles, (stride_ob, stride_ot, stride_oh), rows, key_run,
            total_rows, key_capacity, score_programs, block, b, part, kv_head,
            KV_HEADS, GROUP, OUTPUT_ROWS, HEAD_DIM, BLOCK_TILES, OUTPUT_WORDS, PIECES, TILES, RUNS, WAITS,
            PULL, WARM,
        )  # fmt: skip
    if output_items > 0:  # of three launches, the last
        programs = KV_HEADS * (score_items + softmax_items + output_items)
        leave(counters_ptr, programs, batch * KV_HEADS * num_rows * COUNTERS)
