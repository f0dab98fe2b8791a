"""The predicted time of all Linear of Qwen3-4B on an H100: `python -m bench.gate.linear_model`; needs no GPU.

Written down before any measurement. A launch takes the longest of: its bytes at the copy bandwidth, what its warps have
in flight against the latency of memory, its L2 bytes, its instructions. Instructions of a trip are counted in the SASS
of the shipped kernels, compiled here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench.gate.compiler import compile_case
from bench.gate.facts import facts_of, hot_loop
from bench.gate.model import Machine
from bench.gate.model_cases import model_cases
from kvkern.contract import LINEAR_RUN_LONG
from kvkern.kernels.launch_config import ModelConfig, model_config

PAGE = Path(__file__).parent / "PREDICTIONS_LINEAR.md"
LAYERS, PROMPT, READERS = 36, 3774, (1, 4, 8)
# name, in, out: Qwen3-4B
LAYER = (("q", 2560, 4096), ("k", 2560, 1024), ("v", 2560, 1024), ("o", 4096, 2560), ("gate", 2560, 9728),
         ("up", 2560, 9728), ("down", 9728, 2560))  # fmt: skip
HEAD = ("lm_head", 2560, 151936)
PEAK_BYTES_S, PEAK_FLOPS = 3.35e12, 67e12
REGISTERS_OF_SM, MOST_WARPS = 65536, 64


@dataclass(frozen=True)
class Form:
    """A compiled kernel of run sums.

    Attributes:
        rows: of a program.
        words: words of two channels of a program.
        instructions: of its loop, for one pair of k, per warp.
        fmas: those of them that are fused multiply-adds.
        in_flight_bytes: of weights, per warp.
        warps_per_sm: that its registers allow.
    """

    rows: int
    words: int
    instructions: float
    fmas: float
    in_flight_bytes: int
    warps_per_sm: int


def form(name: str) -> Form:
    """Count the instructions of one pair of k in the SASS of a case."""
    case = next(case for case in model_cases("sm90") if case.name == name)
    compiled = compile_case(case, "sm90")
    counted, fmas = hot_loop(compiled)
    rows, words, unroll = (case.constants[constant] for constant in ("ROWS", "WORDS", "UNROLL"))
    fitting = min(MOST_WARPS, REGISTERS_OF_SM // (32 * math.ceil(facts_of(compiled).registers / 8) * 8))
    return Form(rows, words, 2 * counted / unroll, 2 * fmas / unroll, 4 * words * unroll, fitting)


def seconds(machine: Machine, shape: tuple[str, int, int], rows: int, kind: Form) -> float:
    """Predict the runs and the fold of one Linear, and the gaps behind both."""
    _, inputs, outputs = shape
    runs, words = -(-inputs // LINEAR_RUN_LONG), outputs // 2
    blocks = -(-rows // kind.rows)
    programs = blocks * -(-words // kind.words) * runs
    slots = machine.sms * kind.warps_per_sm
    # Programs are alike and come in waves; in the last one, or the only one, SMs that have none of them are idle.
    waves = max(1.0, programs / slots)
    k_of_program = inputs / runs
    sums_bytes = 4 * runs * rows * outputs
    weight_bytes = 2 * inputs * outputs
    memory = (weight_bytes + 2 * rows * inputs + sums_bytes) / machine.copy_bytes_s
    flowing = waves * k_of_program * 4 * kind.words / kind.in_flight_bytes * machine.latency_s
    l2 = blocks * weight_bytes / machine.l2_bytes_s
    per_scheduler = programs / (4 * machine.sms)
    issue = max(1.0, per_scheduler) * k_of_program / 2 * kind.instructions / machine.clock_hz
    fold = sums_bytes / machine.l2_bytes_s + machine.latency_s
    return max(memory, flowing, l2, issue) + machine.latency_s + fold + 2 * machine.boundary_s


def elementwise_bytes() -> int:
    """Bytes of one token that norms, rotations and SiLU of one layer read and write."""
    norms, heads, mlp = 2 * 2 * 2560, 2 * 2 * (4096 + 1024), 3 * 9728
    return 2 * (norms + heads + mlp)


def page(machine: Machine, config: ModelConfig) -> str:
    """Return the Markdown page."""
    few = {rows: form(f"linear/few/R{rows}") for rows in (1, config.few[0])}
    many = form("linear/many")
    weights = LAYERS * sum(inputs * outputs for _, inputs, outputs in LAYER)
    head = HEAD[1] * HEAD[2]
    lines = [
        "# Predictions for the Linear of Qwen3-4B on an H100",
        "Written by `python -m bench.gate.linear_model` from the launch configuration and the compiled kernels' code, "
        "before any measurement. No GPU has been at hand: nothing here is measured. Assumed as in PREDICTIONS.md; peak "
        f"is {PEAK_BYTES_S / 1e12} TB/s and {PEAK_FLOPS / 1e12:.0f} TFLOP/s of fp32, and a GPU that runs at its peak "
        "does not exist.",
        "## Decode: one token a reader\n\n"
        f"{2 * (weights + head) / 1e9:.2f} GB of weights are read, {7 * LAYERS + 1} Linear in {2 * (7 * LAYERS + 1)} "
        f"launches with {machine.boundary_s * 1e6:.1f} us behind each. A warp has "
        f"{few[1].in_flight_bytes / 1e3:.1f} kB of weight under way.",
        "| readers | floor: bytes at peak | predicted | of that, gaps of launches | instructions a pair and warp |",
        "|---:|---:|---:|---:|---:|",
    ]
    floor = 2 * (weights + head) / PEAK_BYTES_S
    for readers in READERS:
        kind = few[1 if readers == 1 else config.few[0]]
        total = LAYERS * sum(seconds(machine, shape, readers, kind) for shape in LAYER)
        total += seconds(machine, HEAD, readers, kind)
        gaps = 2 * (7 * LAYERS + 1) * machine.boundary_s
        lines.append(
            f"| {readers} | {floor * 1e3:.2f} ms | **{total * 1e3:.2f} ms** | {gaps * 1e3:.2f} ms | "
            f"{kind.instructions:.1f}, {kind.fmas:.0f} of them fma |"
        )
    flops = 2 * weights * PROMPT
    total = LAYERS * sum(seconds(machine, shape, PROMPT, many) for shape in LAYER)
    total += seconds(machine, HEAD, 1, few[1])
    packing = LAYERS * sum(6 * PROMPT * inputs for _, inputs, _ in LAYER) / machine.copy_bytes_s
    packing += 7 * LAYERS * machine.boundary_s
    other = LAYERS * PROMPT * elementwise_bytes() / machine.copy_bytes_s
    lines += [
        f"\n## Prefill of {PROMPT:,} tokens\n",
        f"{flops / 1e12:.1f} TFLOP. Of the block's loop {100 * many.fmas / many.instructions:.0f} % of the "
        f"instructions are fused multiply-adds ({many.fmas:.0f} of {many.instructions:.0f} for a pair of k), "
        f"{many.warps_per_sm} warps fit on an SM with {many.in_flight_bytes / 1e3:.1f} kB of weight under "
        "way each, every program's weights are counted as read from L2. lm_head for one token. Attention is not in it."
        "\n",
        "| floor: fp32 at peak | all Linear, predicted | of x laid out anew | norms, RoPE, SiLU, by bytes | goal |",
        "|---:|---:|---:|---:|---:|",
        f"| {flops / PEAK_FLOPS:.2f} s | **{total + packing:.2f} s** | {packing * 1e3:.1f} ms | {other * 1e3:.1f} ms | "
        "1.5 s |",
    ]
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(Machine(), model_config("sm90")))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
