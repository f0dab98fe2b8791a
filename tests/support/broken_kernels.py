"""Kernels with one deliberate fault each, and what the compile gate says of them, as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import triton
import triton.language as tl

from bench.gate.__main__ import problems_of
from bench.gate.compiler import Case, compile_case
from bench.gate.fast_cases import fast_cases
from kvkern.kernels.primitives import exp_c


@triton.jit
def sound(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, exp_c(x) * x + 1.0)


@triton.jit
def approximate(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.exp(tl.load(x_ptr + i)))


@triton.jit
def quick_division(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, 1.0 / tl.load(x_ptr + i))


@triton.jit
def tensor_core(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i * 16 + j).to(tl.bfloat16)
    tl.store(y_ptr + i * 16 + j, tl.dot(x, x))


@triton.jit
def barrier_in_loop(x_ptr, y_ptr, count, N: tl.constexpr):
    i = tl.arange(0, N)
    for _ in range(count):
        tl.store(y_ptr + i, tl.load(y_ptr + (i + 1) % N) + tl.load(x_ptr + i))
        tl.debug_barrier()


@triton.jit
def spilling(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    for _ in range(3):
        x = tl.sort(x)
        y = tl.load(x_ptr + N + i)
        tl.store(y_ptr + i, x + y)
        x = x + tl.load(y_ptr + N - 1 - i)


FP32 = {"x_ptr": "fp32", "y_ptr": "fp32"}
CASES = {
    "sound": Case("sound", sound, {"N": 128}, 1, FP32),
    "approximate exp": Case("approximate", approximate, {"N": 128}, 1, FP32),
    "division that is not IEEE": Case("quick_division", quick_division, {"N": 128}, 1, FP32),
    "fused multiply-add": Case("fused", sound, {"N": 128}, 1, FP32, {"enable_fp_fusion": True}),
    "tensor core": Case("tensor_core", tensor_core, {"N": 16}, 1, FP32),
    "barrier in a loop": Case("barrier", barrier_in_loop, {"N": 128}, 4, FP32),
    "spill": Case("spilling", spilling, {"N": 2048}, 1, FP32, {"maxnreg": 32}),
}


FAST = fast_cases("sm90")[0]
FAST_CASES = {
    "fast, sound": FAST,
    "fast, no tensor core": Case("sound", sound, {"N": 128}, 1, FP32, profile="fast"),
    "fast, shallow pipeline": replace(FAST, constants={**FAST.constants, "STAGES": 2}),
    "fast, spill": replace(FAST, options={"maxnreg": 128}),
    "fast, fused multiply-add": replace(FAST, options={"enable_fp_fusion": True}),
    "fast, one program a multiprocessor": replace(FAST, num_warps=8),
}


def main() -> None:
    """Print what the gate says of each case, by target."""
    found = {}
    for target in ("sm90", "gfx942"):
        for name, case in CASES.items():
            if target == "gfx942" and name in ("spill", "tensor core"):
                continue  # other options and other words there
            found[f"{target}: {name}"] = problems_of(compile_case(case, target))
    for name, case in FAST_CASES.items():
        found[f"sm90: {name}"] = problems_of(compile_case(case, "sm90"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
