"""The cases of contract part B: Linear for few rows and for many, RMSNorm, RoPE, SiLU. Divisibility as in Qwen3-4B."""

from __future__ import annotations

from bench.gate.compiler import Case
from kvkern.contract import LINEAR_RUN_LONG
from kvkern.kernels import activation, linear, linear_many, norm, rotary
from kvkern.kernels.launch_config import model_config

MAIN_TARGETS = ("sm90", "gfx942")  # one of each maker; the small kernels on these alone
SIZES = ("stride_x", "stride_w", "inputs", "words")
STRIDES = ("stride_x", "stride_o")


def model_cases(target: str) -> list[Case]:
    """Return the cases; all of them must keep the contract's allow-list."""
    config = model_config(target)
    few, many = config.few, config.many
    fp32 = {"partial_ptr": "fp32", "packed_ptr": "i64"}
    cases = []
    for rows in (1, few[0]):
        form = {"ROWS": rows, "WORDS": few[1], "UNROLL": few[2], "RUN": LINEAR_RUN_LONG}
        cases.append(Case(f"linear/few/R{rows}", linear.runs_kernel, form, few[3], fp32, aligned=SIZES))
    form = {"ROWS": many[0], "WORDS": many[1], "UNROLL": many[2], "RUN": LINEAR_RUN_LONG}
    cases.append(Case("linear/many", linear_many.block_kernel, form, many[3], fp32, aligned=SIZES))
    halves = dict.fromkeys(("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "gate_ptr", "up_ptr", "table_ptr"), "i16")
    constants = {"CHANNELS": config.norm_lanes}
    cases.append(Case("norm", norm.norm_kernel, constants, config.norm_warps, halves, aligned=(*STRIDES, "width")))
    if target not in MAIN_TARGETS:
        return cases
    fold = {"WORDS": config.fold_words, "RUNS": config.fold_runs}
    silu = {"HAS_UP": 1, "LANES": config.activation_lanes}
    pack = {"ROWS": many[0], "PAIRS": config.pack_pairs}
    rope = {"HALF": 64, "LANES": 64}
    return [
        *cases,
        Case("linear/fold", linear.fold_kernel, fold, config.fold_warps, aligned=("stride_o", "outputs", "words")),
        Case("linear/pack", linear_many.pack_kernel, pack, config.pack_warps, fp32, aligned=("stride_x", "pairs")),
        Case("silu", activation.silu_kernel, silu, config.activation_warps, halves, aligned=("count",)),
        Case("rotary/D128", rotary.rotary_kernel, rope, config.rotary_warps, {**halves, "position_ptr": "i64"}),
    ]
