"""The cases: every shipped kernel at the shapes that models have, with the shipped launch configuration of a target."""

from __future__ import annotations

from bench.gate.compiler import Case
from bench.gate.model_cases import model_cases
from kvkern.kernels import append, exact
from kvkern.kernels.launch_config import exact_config

BLOCK_TILES = 4
# (query heads of a KV head, head_dim): Qwen3-4B; SmolLM2; one head each; Llama-3-70B; wide heads
SHAPES = ((4, 128), (3, 64), (1, 96), (8, 128), (4, 256))
EVERYWHERE = 2  # the first shapes, on all targets; the others on the main one alone: a compile takes seconds
MAIN_TARGET = "sm90"


def exact_cases(target: str) -> list[Case]:
    """Return the exact kernels' cases; all of them must keep the contract's allow-list."""
    config = exact_config(target)
    cases = []
    for group, head_dim in SHAPES if target == MAIN_TARGET else SHAPES[:EVERYWHERE]:
        words = config.output_words_for(head_dim)
        lanes = 1 << (head_dim - 1).bit_length()
        heads, name = {"KV_HEADS": 8, "GROUP": group}, f"G{group}-D{head_dim}"
        shape = {**heads, "HEAD_DIM": head_dim, "BLOCK_TILES": BLOCK_TILES}
        score = {
            **shape,
            "ROWS": min(config.score_rows, group),
            "WORDS": config.score_words,
            "UNROLL": config.score_unroll_for(head_dim),
        }
        output = {**shape, "ROWS": min(config.output_rows, group), "WORDS": words}
        output["PIECES"] = -(-head_dim // 2 // words)
        fold = {**heads, "HEAD_DIM": head_dim, "LANES": lanes, "RUNS": config.fold_runs}
        cases += [
            Case(f"score/{name}", exact.score_kernel, score, config.score_warps),
            Case(f"output/{name}", exact.output_kernel, output, config.output_warps),
            Case(f"fold/{name}", exact.fold_kernel, fold, config.fold_warps),
        ]
        if (group, head_dim) == SHAPES[0]:
            softmax = {**heads, "KEYS": config.softmax_keys, "STEPS": config.softmax_steps}
            for has_lse in (0, 1):
                constants = {**softmax, "HAS_LSE": has_lse}
                label = f"softmax/G{group}{'-lse' if has_lse else ''}"
                cases.append(Case(label, exact.softmax_kernel, constants, config.softmax_warps, {"t_ptr": "i16"}))
    moved = {f"{name}_ptr": "i16" for name in ("k", "v", "suffix_k", "suffix_v")}
    cases.append(Case("append/D128", append.append_kernel, {"HEAD_DIM": 128, "LANES": 128}, 1, moved))
    return cases + model_cases(target)
