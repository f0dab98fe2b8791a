"""Exact attention in Triton: contract part A over packed tiles, in three launches.

    score    t = RNE16(RNE16(RNE16(q k) c) + 0), maxima   a program: rows of one reader, one KV head, some keys
    softmax  exp, then 16-lane sum and p                  a program: one row, some keys; the last one sums the row
    output   one chain per (row, channel, run), then the  a program: rows of one reader, some channels, one run of
             run sums added left to right, RNE16          keys; the last one adds the run sums

Bits depend on q, K and V by position, sm_scale and key_run alone. A program owns whole chains, and lanes never meet,
except in the max, which has no order, and in halve16; who arrives last does what any other would have done, with what
all of them have left. Two neighbouring bf16 travel in one 32-bit word: keys in a K tile, channels in a V tile, channels
in q; p travels as pairs of fp32. Critical paths: score, head_dim dependent fmas; softmax, keys / 16 dependent adds;
output, 512 (or 1,024) dependent fmas, then one add per run. No kernel divides by a number that is not known when it is
compiled, because some targets divide integers by floating point. Tensors have one axis: with two, some versions of
Triton give them layouts that differ from load to load, with a barrier for each conversion. Loops that carry words ask
for them in a first trip that computes nothing: each load that is written out twice costs the compiler seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvkern.contract import KEY_RUN, TILE_TOKENS
from kvkern.kernels.exact_output import output_kernel
from kvkern.kernels.exact_score import COUNTERS, score_kernel
from kvkern.kernels.exact_softmax import softmax_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ExactConfig


@dataclass(frozen=True)
class ScratchLayout:
    """Where the arrays of a call lie in its scratch, in bytes; functions of shapes alone.

    Attributes:
        key_capacity: keys of a row in `t` and `e`.
        runs: rows of `partial`.
        t: scores: `[rows, key_capacity]` bf16 bits.
        e: exponentials, then p: `[rows, key_capacity]` fp32.
        partial: `[runs, rows, head_dim]` fp32.
        top: order keys of largest scores: `[rows, key_capacity / (2 * score_words)]` int32.
        flag: `[rows]` int32.
        arrived: counters: `[rows, 16]` int32.
        nbytes: all of it.
    """

    key_capacity: int
    runs: int
    t: int
    e: int
    partial: int
    top: int
    flag: int
    arrived: int
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
        rows * keys * 2,
        rows * keys * 4,
        runs * rows * head_dim * 4,
        rows * tops * 4,
        rows * 4,
        rows * COUNTERS.value * 4,
    ]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    return ScratchLayout(keys, runs, *starts)


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
    """Launch the three kernels for some query positions; tensors as in `triton_door.attend`.

    Args:
        q: all positions.
        out: all positions.
        lse: all positions, or None.
        lengths: prefix_len, reader_prefix, suffix_len and query_len.
        pool: anchor of all tiles.
        place: block table, tiles of a block, and in elements the stride of a tile and the layer's offset.
        suffix_k: keys of the suffixes.
        suffix_v: values of the suffixes.
        scratch: uint8.
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
    num_rows, words, heads = group * count, pool.view(torch.int32), batch * kv_heads

    def array(start: int, dtype: torch.dtype) -> Tensor:
        return scratch[start:].view(dtype)

    top, flag, arrived = (array(start, torch.int32) for start in (layout.top, layout.flag, layout.arrived))
    e = array(layout.e, torch.float32)
    strides = [stride // 2 for stride in (*suffix_k.stride()[:3], stride_tile, layer_offset)]
    rows = (num_rows, max_query_len, first_query)
    strict: dict[str, Any] = {"KV_HEADS": kv_heads, "GROUP": group, "enable_fp_fusion": False}
    tiles = {**strict, "HEAD_DIM": head_dim, "BLOCK_TILES": block_tiles}
    score_rows, score_words = min(config.score_rows, num_rows), config.score_words
    score_kernel[(-(-num_rows // score_rows), heads, capacity // (2 * score_words))](
        q.view(torch.int32), words, table, *lengths[:3], array(layout.t, torch.int32), top, arrived,
        *(stride // 2 for stride in q.stride()[:3]), (suffix_k.data_ptr() - pool.data_ptr()) // 4, *strides,
        table.shape[1], *rows, capacity, sm_scale,
        ROWS=score_rows, WORDS=score_words, UNROLL=config.score_unroll_for(head_dim), num_warps=config.score_warps,
        **tiles,
    )  # fmt: skip
    parts = -(-capacity // (config.softmax_keys * config.softmax_passes))
    softmax_kernel[(num_rows, heads, parts)](
        array(layout.t, torch.int16), top, e, flag, e if lse is None else lse, arrived, *lengths,
        *rows, lse is not None, capacity,
        WORDS=score_words, KEYS=config.softmax_keys, PASSES=config.softmax_passes, STEPS=config.softmax_steps,
        num_warps=config.softmax_warps, **strict,
    )  # fmt: skip
    output_rows, output_words, pieces = config.output_shape(num_rows, head_dim)
    output_kernel[(-(-num_rows // output_rows), heads * pieces, layout.runs)](
        array(layout.e, torch.int64), words, table, *lengths, array(layout.partial, torch.int64), flag, arrived,
        out.view(torch.int16), (suffix_v.data_ptr() - pool.data_ptr()) // 4, *strides, *out.stride()[:3],
        table.shape[1], *rows, key_run, heads * num_rows, capacity,
        ROWS=output_rows, WORDS=output_words, PIECES=pieces, TILES=config.output_tiles, RUNS=config.fold_runs,
        num_warps=config.output_warps, **tiles,
    )  # fmt: skip
