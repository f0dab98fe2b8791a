"""The fast kernel's cases: every unit that a target's configuration may choose, at the shapes that models have."""

from __future__ import annotations

from bench.gate.cases import BLOCK_TILES, MAIN_TARGET
from bench.gate.compiler import Case
from kvkern.contract import TILE_TOKENS
from kvkern.kernels import fast
from kvkern.kernels.launch_config import fast_config

# (query heads of a KV head, head_dim, has lse): Qwen3-4B; SmolLM2; one head each; Llama-3-70B
SHAPES = ((4, 128, 0), (3, 64, 0), (4, 128, 1), (1, 64, 0), (8, 128, 0))
EVERYWHERE = 2
BF16 = {f"{name}_ptr": "bf16" for name in ("q", "pool", "suffix_k", "suffix_v")}


def fast_cases(target: str) -> list[Case]:
    """Return the fast kernel's cases; tensor cores are required in them."""
    config = fast_config(target)
    cases = []
    for group, head_dim, has_lse in SHAPES if target == MAIN_TARGET else SHAPES[:EVERYWHERE]:
        for unit in config.units(head_dim):
            constants = {
                "KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_TILES": BLOCK_TILES,
                "BLOCK_M": config.block_m, "UNIT_TILES": unit // TILE_TOKENS, "FOLD_ROWS": config.fold_rows,
                "STAGES": config.stages, "HAS_LSE": has_lse, "WIDEN": False,
            }  # fmt: skip
            name = f"fast/G{group}-D{head_dim}-U{unit}{'-lse' if has_lse else ''}"
            cases.append(Case(name, fast.fast_kernel, constants, config.warps, BF16, config.options, profile="fast"))
    return cases
