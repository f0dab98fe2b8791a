"""The launches of an exact call: which there are, where their arrays lie in the scratch, and their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvkern.contract import KEY_RUN, TILE_TOKENS
from kvkern.kernels import exact
from kvkern.kernels.exact_score import COUNTERS

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ExactConfig


class Stage(NamedTuple):
    """One launch of a call.

    Attributes:
        is_score: the score kernel, else the output kernel.
        softmax_head: first KV head whose softmax it does; None for none.
        first_head: first KV head of its own work; None for none.
        heads: KV heads of either.
    """

    is_score: bool
    softmax_head: int | None
    first_head: int | None
    heads: int


def stages(kv_heads: int, key_capacity: int, config: ExactConfig) -> list[Stage]:
    """List the launches of a call; a function of shapes."""
    if not config.goes_in_halves(kv_heads, key_capacity):
        return [Stage(True, None, 0, kv_heads), Stage(False, 0, None, kv_heads), Stage(False, None, 0, kv_heads)]
    half = kv_heads // 2
    return [Stage(True, None, 0, half), Stage(True, 0, half, half), Stage(False, half, 0, half),
            Stage(False, None, half, half)]  # fmt: skip


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
    keys = -(-tile_capacity * TILE_TOKENS // step) * step
    runs = -(-keys // KEY_RUN)
    tops = keys // (2 * config.score_words)
    sizes = [rows * keys * 2, rows * keys * 4, runs * rows * head_dim * 4, rows * tops * 4, rows * 4, rows * COUNTERS.value * 4]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    return ScratchLayout(keys, runs, *starts)


def launch(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    suffix_k: Tensor,
    suffix_v: Tensor,
    scratch: Tensor,
    shared: dict[str, Any],
    queries: int,
    sm_scale: float,
    key_run: int,
    layout: ScratchLayout,
    config: ExactConfig,
) -> None:
    """Launch the stages of a slice of Tq; `shared` holds the arguments that need no work, by the kernels' names."""
    batch, num_q_heads, _, head_dim = q.shape
    kv_heads = suffix_k.shape[1]
    group, capacity = num_q_heads // kv_heads, layout.key_capacity
    num_rows, base = group * queries, shared["pool_ptr"].data_ptr()
    both = shared | _arrays(scratch, layout) | {
        **dict(zip(("stride_sb", "stride_sh", "stride_st"), (n // 2 for n in suffix_k.stride()[:3]), strict=True)),
        "num_rows": num_rows, "key_capacity": capacity, "has_lse": int(lse is not None),
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim,
        "KEYS": config.softmax_keys, "PASSES": config.softmax_passes, "STEPS": config.softmax_steps,
        "num_warps": config.warps, "enable_fp_fusion": False,
    }  # fmt: skip
    both["lse_ptr"] = both["e_ptr"] if lse is None else lse
    score_rows = min(config.score_rows, num_rows)
    score = {
        "q_ptr": q.view(torch.int32), "t_ptr": both["t16_ptr"].view(torch.int32),
        **dict(zip(("stride_qb", "stride_qh", "stride_qt"), (n // 2 for n in q.stride()[:3]), strict=True)),
        "suffix_start": (suffix_k.data_ptr() - base) // 4, "sm_scale": sm_scale,
        "ROWS": score_rows, "WORDS": config.score_words, "UNROLL": config.score_unroll_for(head_dim),
    }  # fmt: skip
    output_rows, words, pieces = config.output_shape(num_rows, head_dim)
    output = {
        "p_ptr": both["e_ptr"].view(torch.int64), "out_ptr": out.view(torch.int16),
        **dict(zip(("stride_ob", "stride_ot", "stride_oh"), out.stride()[:3], strict=True)),
        "partial_ptr": scratch[layout.partial :].view(torch.float32),
        "suffix_start": (suffix_v.data_ptr() - base) // 4, "key_run": key_run,
        "total_rows": batch * kv_heads * num_rows, "ROWS": output_rows, "WORDS": words, "PIECES": pieces,
        "TILES": config.output_tiles, "RUNS": config.fold_runs, "SCORE_WORDS": config.score_words,
    }  # fmt: skip
    parts = -(-capacity // (config.softmax_keys * config.softmax_passes))
    for stage in stages(kv_heads, capacity, config):
        kernel, own, work = (
            (exact.score_kernel, score, capacity // (2 * config.score_words))
            if stage.is_score
            else (exact.output_kernel, output, layout.runs * pieces)
        )
        softmax_programs = 0 if stage.softmax_head is None else own["ROWS"] * parts
        programs = softmax_programs + (0 if stage.first_head is None else work)
        kernel[(-(-num_rows // own["ROWS"]), batch * stage.heads, programs)](
            **both, **own, softmax_programs=softmax_programs, softmax_head=stage.softmax_head or 0,
            first_head=stage.first_head or 0, HEADS=stage.heads,
        )  # fmt: skip


def _arrays(scratch: Tensor, layout: ScratchLayout) -> dict[str, Tensor]:
    types = {"t16": torch.int16, "top": torch.int32, "e": torch.float32, "flag": torch.int32, "arrived": torch.int32}
    starts = {"t16": layout.t, "top": layout.top, "e": layout.e, "flag": layout.flag, "arrived": layout.arrived}
    return {f"{name}_ptr": scratch[starts[name] :].view(dtype) for name, dtype in types.items()}
