"""The door to the Triton kernels: scratch and launches. Allocates nothing, validates nothing, never synchronises."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from kvkern.contract import KEY_RUN, TILE_TOKENS
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import append as append_module
from kvkern.kernels import exact
from kvkern.kernels.launch_config import ExactConfig, exact_config

LAUNCHES = 4
"""Kernel launches of one exact call of one layer."""


@dataclass(frozen=True)
class ScratchLayout:
    """Where the four arrays of a call lie in its scratch, in bytes; functions of shapes alone.

    Attributes:
        key_capacity: keys of a row in `t` and `e`.
        runs: rows of `partial`.
        t: scores, then p: `[rows, key_capacity]` bf16 bits.
        e: `[rows, key_capacity]` fp32.
        partial: `[runs, rows, head_dim]` fp32.
        flag: `[rows]` int32.
        nbytes: all of it.
    """

    key_capacity: int
    runs: int
    t: int
    e: int
    partial: int
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
    step = max(config.softmax_keys, 2 * config.score_words, KEY_RUN)
    keys = -(-tile_capacity * TILE_TOKENS // step) * step
    runs = -(-keys // KEY_RUN)
    sizes = [rows * keys * 2, rows * keys * 4, runs * rows * head_dim * 4, rows * 4]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    return ScratchLayout(keys, runs, *starts)


@functools.cache
def architecture(device: torch.device) -> str:
    """Name a device as the configurations do; a CPU stands for the interpreter."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").partition(":")[0]
    return name or f"sm{properties.major}{properties.minor}"


def is_interpreted() -> bool:
    """Whether Triton runs in its interpreter, which reads CPU tensors: for tests."""
    return not isinstance(exact.score_kernel, triton.JITFunction)


def require_available(device: torch.device) -> None:
    """Refuse a device that the Triton kernels do not run on.

    Raises:
        UnsupportedError: a CPU outside the interpreter, or an architecture without a configuration.
    """
    if device.type == "cpu" and not is_interpreted():
        raise UnsupportedError(
            "backend 'triton' reads GPU memory; on a CPU it runs in Triton's interpreter only, for tests: set "
            "TRITON_INTERPRET=1 before kvkern is imported, or take backend 'c'"
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"backend 'triton' does not run on {device.type!r}: move the tensors to 'cuda'")
    config_for(device)


def scratch_bytes(q: Tensor, block_table: Tensor, block_tiles: int, suffix_k: Tensor, bound_bytes: int) -> int:
    """Bytes of scratch for a call: what it needs at once, but no more than the bound or one query position."""
    batch, heads, rows, head_dim = q.shape
    tiles = block_table.shape[1] * block_tiles + suffix_k.shape[2]
    config = config_for(q.device)
    least, most = (scratch_layout(batch * heads * n, head_dim, tiles, config).nbytes for n in (1, max(rows, 1)))
    return max(least, min(most, bound_bytes))


def append(k: Tensor, v: Tensor, suffix_k: Tensor, suffix_v: Tensor, first_slot: Tensor, count: Tensor) -> None:
    """Write the last `count[b]` of each reader's new tokens into its suffix tiles; arguments as in `native.append`."""
    batch, heads, tokens, head_dim = k.shape
    if k.numel() == 0:
        return
    with torch.cuda.device_of(k):
        append_module.append_kernel[(tokens, heads, batch)](
            k.view(torch.int16), v.view(torch.int16), first_slot, count,
            suffix_k.view(torch.int16), suffix_v.view(torch.int16),
            *k.stride()[:3], *v.stride()[:3], *suffix_k.stride()[:3], tokens,
            HEAD_DIM=head_dim, LANES=1 << (head_dim - 1).bit_length(), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def config_for(device: torch.device) -> ExactConfig:
    """Return the launch configuration of a device."""
    return exact_config(architecture(device))


def attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    pool: Tensor,
    block_table: Tensor,
    block_tiles: int,
    stride_tile: int,
    layer_offset: int,
    prefix_len: Tensor,
    reader_prefix: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    sm_scale: float,
    key_run: int,
    scratch: Tensor,
    config: ExactConfig | None = None,
) -> None:
    """Attend under contract part A; arguments as in `native.attend`, and two more.

    `scratch`, uint8: Tq is split so that each slice fits; one query position of all readers must fit. `config`: another
    launch configuration; no bit depends on it.
    """
    config = config or config_for(q.device)
    batch, num_q_heads, max_query_len, head_dim = q.shape
    num_kv_heads, group = suffix_k.shape[1], num_q_heads // suffix_k.shape[1]
    tile_capacity = block_table.shape[1] * block_tiles + suffix_k.shape[2]
    position_rows = batch * num_q_heads
    if batch == 0 or max_query_len == 0:
        return
    slice_len = max_query_len
    need = partial(scratch_layout, head_dim=head_dim, tile_capacity=tile_capacity, config=config)
    while slice_len > 1 and need(position_rows * slice_len).nbytes > scratch.numel():
        slice_len = -(-slice_len // 2)
    if need(position_rows * slice_len).nbytes > scratch.numel():
        raise LayoutError(
            f"scratch is {scratch.numel()} bytes; it must be at least {need(position_rows).nbytes}, what one query "
            "position of all readers needs"
        )
    lengths = (prefix_len, reader_prefix, suffix_len, query_len)
    words = pool.view(torch.int32)
    q_words, base = q.view(torch.int32), pool.data_ptr()
    suffix_strides = [stride // 2 for stride in suffix_k.stride()[:3]]
    place = (stride_tile // 2, layer_offset // 2, block_table.shape[1])
    strict = {"enable_fp_fusion": False}
    heads = {"KV_HEADS": num_kv_heads, "GROUP": group, **strict}
    tiles = {**heads, "HEAD_DIM": head_dim, "BLOCK_TILES": block_tiles}
    for first_query in range(0, max_query_len, slice_len):
        queries = min(slice_len, max_query_len - first_query)
        num_rows, total_rows = group * queries, position_rows * queries
        layout = need(total_rows)
        t, e, run_sums, flag = (scratch[start:] for start in (layout.t, layout.e, layout.partial, layout.flag))
        t16, t32, e = t.view(torch.int16), t.view(torch.int32), e.view(torch.float32)
        run_sums, flag = run_sums.view(torch.float32), flag.view(torch.int32)
        score_rows, output_rows = min(config.score_rows, num_rows), min(config.output_rows, num_rows)
        score_grid = (-(-num_rows // score_rows), batch * num_kv_heads, layout.key_capacity // (2 * config.score_words))
        exact.score_kernel[score_grid](
            q_words, words, block_table, *lengths, t32,
            *(stride // 2 for stride in q.stride()[:3]), (suffix_k.data_ptr() - base) // 4, *suffix_strides, *place,
            num_rows, max_query_len, first_query, layout.key_capacity, sm_scale,
            ROWS=score_rows, WORDS=config.score_words, UNROLL=config.score_unroll_for(head_dim),
            num_warps=config.score_warps, **tiles,
        )  # fmt: skip
        exact.softmax_kernel[(num_rows, batch * num_kv_heads)](
            t16, e, flag, flag if lse is None else lse, *lengths,
            num_rows, max_query_len, first_query, layout.key_capacity,
            KEYS=config.softmax_keys, STEPS=config.softmax_steps, HAS_LSE=lse is not None,
            num_warps=config.softmax_warps, **heads,
        )  # fmt: skip
        output_words = config.output_words_for(head_dim)
        pieces = -(-head_dim // 2 // output_words)
        exact.output_kernel[(-(-num_rows // output_rows), batch * num_kv_heads * pieces, layout.runs)](
            t32, words, block_table, *lengths, run_sums,
            (suffix_v.data_ptr() - base) // 4, *suffix_strides, *place,
            num_rows, max_query_len, first_query, key_run, total_rows, layout.key_capacity,
            ROWS=output_rows, WORDS=output_words, PIECES=pieces,
            num_warps=config.output_warps, **tiles,
        )  # fmt: skip
        exact.fold_kernel[(num_rows, batch * num_kv_heads)](
            run_sums, flag, out.view(torch.int16), *lengths,
            out.stride(0), out.stride(1), out.stride(2),
            num_rows, max_query_len, first_query, key_run, total_rows,
            HEAD_DIM=head_dim, LANES=1 << (head_dim - 1).bit_length(), RUNS=config.fold_runs,
            num_warps=config.fold_warps, **heads,
        )  # fmt: skip
