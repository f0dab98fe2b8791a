"""The cases: every shipped kernel at the shapes that models have, with the shipped launch configuration of a target."""

from __future__ import annotations

from bench.gate.compiler import Case
from bench.gate.model_cases import model_cases
from kvkern.kernels import append, exact
from kvkern.kernels.launch_config import exact_config

BLOCK_TILES = 4
# (query heads of a KV head, head_dim): Qwen3-4B; SmolLM2. Eight query heads have programs of four, and head_dim 256
# more pieces and trips of the same code, with the same figures.
SHAPES = ((4, 128), (3, 64))
EVERYWHERE = 1  # the first shape, on all targets; the other on the main one alone: a compile takes 10 to 25 seconds
MAIN_TARGET = "sm90"


def exact_cases(target: str) -> list[Case]:
    """Return the exact kernels' cases; all of them must keep the contract's allow-list."""
    config = exact_config(target)
    cases = []
    for group, head_dim in SHAPES if target == MAIN_TARGET else SHAPES[:EVERYWHERE]:
        rows, words, pieces = config.output_shape(group, head_dim)
        constants = {
            "KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_TILES": BLOCK_TILES,
            "SCORE_ROWS": min(config.score_rows, group), "SCORE_WORDS": config.score_words,
            "UNROLL": config.score_unroll_for(head_dim), "KEYS": config.softmax_keys, "PASSES": config.softmax_passes,
            "STEPS": config.softmax_steps, "OUTPUT_ROWS": rows, "OUTPUT_WORDS": words, "PIECES": pieces,
            "TILES": config.output_tiles, "RUNS": config.fold_runs, "LAG": config.lag, "WAITS": config.launches == 1,
            "PULL": config.pull, "WARM": config.warm,
        }  # fmt: skip
        pairs = {"pairs_ptr": "i64", "partial_ptr": "i64"}
        cases.append(
            Case(f"exact/G{group}-D{head_dim}", exact.exact_kernel, constants, config.warps, pairs, config.options)
        )
    moved = {f"{name}_ptr": "i16" for name in ("k", "v", "suffix_k", "suffix_v")}
    cases.append(Case("append/D128", append.append_kernel, {"HEAD_DIM": 128, "LANES": 128}, 1, moved))
    return cases + model_cases(target)
