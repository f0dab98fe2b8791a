"""The cases of contract part B: Linear for few rows and for many, RMSNorm, RoPE, SiLU. Divisibility as in Qwen3-4B."""

from __future__ import annotations

from bench.gate.compiler import Case
from kvkern.contract import LINEAR_RUN_LONG
from kvkern.kernels import activation, linear, norm, rotary
from kvkern.kernels.launch_config import model_config

MAIN_TARGETS = ("sm90", "gfx942")  # one of each maker; the small kernels on these alone
LINEAR_SIZES = ("stride_x", "stride_w", "inputs", "words")
STRIDES = ("stride_x", "stride_o")


def model_cases(target: str) -> list[Case]:
    """Return the cases; all of them must keep the contract's allow-list."""
    config = model_config(target)
    cases = []
    for name, rows in (("few/R1", 1), ("few/R4", config.few[0]), ("many", config.few_rows + 1)):
        form = config.linear_form(rows if name != "many" else 1 << 12)
        warps = form.pop("num_warps")
        fp32 = {"partial_ptr": "fp32"}
        constants = {**form, "RUN": LINEAR_RUN_LONG}
        cases.append(Case(f"linear/{name}", linear.runs_kernel, constants, warps, fp32, aligned=LINEAR_SIZES))
    halves = dict.fromkeys(("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "gate_ptr", "up_ptr", "table_ptr"), "i16")
    constants = {"CHANNELS": config.norm_lanes}
    cases.append(Case("norm", norm.norm_kernel, constants, config.norm_warps, halves, aligned=(*STRIDES, "width")))
    if target not in MAIN_TARGETS:
        return cases
    fold = {"WORDS": config.fold_words, "RUNS": config.fold_runs}
    silu = {"HAS_UP": 1, "LANES": config.activation_lanes}
    rope = {"HALF": 64, "LANES": 64}
    return [
        *cases,
        Case("linear/fold", linear.fold_kernel, fold, config.fold_warps, aligned=("stride_o", "outputs", "words")),
        Case("silu", activation.silu_kernel, silu, config.activation_warps, halves, aligned=("count",)),
        Case("rotary/D128", rotary.rotary_kernel, rope, config.rotary_warps, {**halves, "position_ptr": "i64"}),
    ]
