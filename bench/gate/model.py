"""The predicted time of one exact decode layer on an H100: `python -m bench.gate.model`.

Written down before any measurement; `bench/gpu.py` prints it beside what a GPU then says. Scores and output take the
longest of four: bytes at the copy bandwidth, bytes at what the warps have in flight, instructions, the longest chain;
and once the latency of memory. Readers of one prefix take its tiles from HBM once and from L2 after that. Softmax is a
row of steps that wait for each other, and so is what the last program of an output does: both are counted in round
trips to the L2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvkern.kernels.launch_config import ExactConfig, exact_config

GROUP, KV_HEADS, HEAD_DIM, TILE, RUN = 4, 8, 128, 64, 512
READERS, KEYS = (1, 2, 4, 8), (3774, 32768)
GOAL_S, GOAL_SHARE = 10e-6, 0.85
PAGE = Path(__file__).parent / "PREDICTIONS.md"


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU; none of it was measured here.

    Attributes:
        sms: streaming multiprocessors.
        clock_hz: boost clock.
        copy_bytes_s: copy bandwidth that others have measured.
        latency_s: from a load to its data, from HBM.
        l2_latency_s: the same from a busy L2: assumed. Of an idle one see arXiv 2402.13499.
        sm_bytes_cycle: bytes that an SM takes from L2, or gives to it, in a cycle: assumed.
        add_cycles: of a dependent addition or fma.
        boundary_s: between two launches inside a graph.
        l2_bytes_s: bandwidth of the L2.
    """

    sms: int = 132
    clock_hz: float = 1.755e9
    copy_bytes_s: float = 3.0e12
    latency_s: float = 0.45e-6
    l2_latency_s: float = 0.25e-6
    sm_bytes_cycle: int = 64
    add_cycles: int = 4
    boundary_s: float = 1.3e-6
    l2_bytes_s: float = 5.5e12


@dataclass(frozen=True)
class Cost:
    """One kernel of a call.

    Attributes:
        name: the kernel.
        programs: of a launch.
        warps: of a program.
        fitting: warps that an SM's registers hold.
        hbm_bytes: from and to HBM.
        l2_bytes: from L2, the HBM bytes among them.
        in_flight_bytes: of K or V, per warp; what several warps of a program ask for at once counts once.
        instructions: warp instructions, all programs together.
        chain: dependent additions or fmas of the longest path.
        steps_s: what comes one after the other besides: before, between or behind the above.
    """

    name: str
    programs: int
    warps: int
    fitting: int
    hbm_bytes: float
    l2_bytes: float
    in_flight_bytes: float
    instructions: float
    chain: int
    steps_s: float = 0.0

    def warps_per_sm(self, machine: Machine) -> float:
        """Warps that an SM has, over the whole launch."""
        return self.programs * self.warps / machine.sms

    def in_flight_per_sm(self, machine: Machine) -> float:
        """Bytes that an SM has asked for at once."""
        return min(self.warps_per_sm(machine), self.fitting) * self.in_flight_bytes

    def seconds(self, machine: Machine) -> float:
        """Predicted time, launch excluded."""
        if not self.hbm_bytes:
            return self.steps_s
        busy = min(self.programs, machine.sms)
        flowing = self.in_flight_per_sm(machine) * machine.sms / machine.latency_s
        memory = max(self.hbm_bytes / machine.copy_bytes_s, self.l2_bytes / min(machine.l2_bytes_s, flowing))
        issue = self.instructions / (min(4, self.warps_per_sm(machine) * machine.sms / busy) * busy * machine.clock_hz)
        chain = self.chain * machine.add_cycles / machine.clock_hz
        return max(memory, issue, chain) + machine.latency_s + self.steps_s


SCORE_ROW, SCORE_PAIR = 7, 6
"""Instructions of a pair of channels for 64 keys: of a row a load, widening and 4 fmas; of K loads and widening."""
OUTPUT_PAIR = 14
"""The same of a pair of keys for one row and 64 channels: as compiled, 4 fmas, 4 widenings, 3 loads, zeroes."""
EXP, PROBABILITY = 34, 10
"""Instructions for 32 keys: the exponential with its load and store; p with its own."""


def costs(
    readers: int, keys: int, config: ExactConfig, facts: dict[str, dict[str, int]], machine: Machine | None = None
) -> list[Cost]:
    """Return the three kernels' costs for readers of one prefix, one query each."""
    machine = machine or Machine()
    tiles, runs = -(-keys // TILE), -(-keys // RUN)
    rows, half = readers * GROUP * KV_HEADS, keys * KV_HEADS * HEAD_DIM * 2
    trip = min(2 * config.score_unroll, HEAD_DIM)
    score_rows = min(config.score_rows, GROUP)
    score_programs = readers * KV_HEADS * -(-tiles * TILE // (2 * config.score_words)) * (GROUP // score_rows)
    output_rows, words, pieces = config.output_shape(GROUP, HEAD_DIM)
    blocks = GROUP // output_rows
    output_programs = readers * KV_HEADS * pieces * runs * blocks
    ahead = config.output_tiles * TILE
    # Arriving is a fence and an atomic; then batches of run sums, the flag and the first sum among the first batch.
    fold = 2 + max(1, -(-(runs - 1) // config.fold_runs))
    part = config.softmax_keys * config.softmax_passes
    parts = -(-keys // part)

    def fitting(name: str, warps: int) -> int:
        programs = 65536 // (32 * warps * -(-facts[name]["registers"] // 8) * 8)
        return min(64, warps * programs)

    return [
        Cost("score", score_programs, config.score_warps, fitting("score/G4-D128", config.score_warps), half,
             half * readers * (GROUP // score_rows) + 2 * rows * keys, trip * 128,
             score_programs * config.score_words // 32 * HEAD_DIM // 2 * (SCORE_PAIR + SCORE_ROW * score_rows),
             HEAD_DIM),
        Cost("softmax", rows * parts, config.softmax_warps, fitting("softmax/G4", config.softmax_warps), 0, 0,
             facts["softmax/G4"]["in_flight_bytes"], 0, -(-keys // 16),
             softmax_seconds(rows, keys, part, machine)),
        Cost("output", output_programs, config.output_warps, fitting("output/G4-D128", config.output_warps), half,
             half * readers * blocks + 4 * rows * keys * pieces + 4 * rows * runs * HEAD_DIM,
             ahead * words * 4 / config.output_warps,
             output_programs * config.output_warps * (RUN + ahead) / 2 * OUTPUT_PAIR, RUN + ahead,
             fold * machine.l2_latency_s),
    ]  # fmt: skip


def softmax_seconds(rows: int, keys: int, part: int, machine: Machine) -> float:
    """Scores and maxima arrive; exponentials; arriving, if there are parts; the sum; p."""
    parts = -(-keys // part)
    exponentials = -(-rows * parts // machine.sms) * min(keys, part) / 32 * EXP / 4
    sums = keys / 16 * machine.add_cycles
    last = -(-rows // machine.sms) * max(keys / 32 * PROBABILITY / 4, keys * 8 / machine.sm_bytes_cycle)
    trips = 1 + (2 if parts > 1 else 0) + 2  # e is read back for the sum, and once more for p
    return (exponentials + sums + last) / machine.clock_hz + trips * machine.l2_latency_s


def page(machine: Machine, config: ExactConfig, facts: dict[str, dict[str, int]]) -> str:
    """Return the Markdown page."""
    gap_us = f"{machine.boundary_s * 1e6:.1f} us"
    lines = [
        "# Predictions for one exact decode layer on an H100",
        "Written by `python -m bench.gate.model` from the launch configuration and the compiled kernels' facts, before "
        "any measurement. No GPU has been at hand: nothing here is measured. Qwen3-4B layer (32 query heads, 8 KV "
        "heads, head_dim 128), one query a reader, one prefix for all readers.",
        f"Assumed: {machine.sms} SMs at {machine.clock_hz / 1e9} GHz, copy bandwidth {machine.copy_bytes_s / 1e12} "
        f"TB/s, L2 {machine.l2_bytes_s / 1e12} TB/s, latency {machine.latency_s * 1e6:.2f} us, from L2 "
        f"{machine.l2_latency_s * 1e6:.2f} us, {gap_us} between launches in a graph, {machine.add_cycles} cycles a "
        f"dependent fma, {machine.sm_bytes_cycle} bytes a cycle between an SM and L2. Warps that ask for the same V "
        "bytes count them once.",
        "| keys | readers | kernel | warps per SM | K or V bytes in flight per SM | longest chain | predicted us |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    reached: dict[tuple[int, int], tuple[float, float]] = {}
    for keys in KEYS:
        for readers in READERS:
            total, floor = 2 * machine.boundary_s, 2 * keys * KV_HEADS * HEAD_DIM * 2 / machine.copy_bytes_s
            for cost in costs(readers, keys, config, facts):
                seconds = cost.seconds(machine)
                total += seconds
                lines.append(
                    f"| {keys:,} | {readers} | {cost.name} | {cost.warps_per_sm(machine):.1f} | "
                    f"{cost.in_flight_per_sm(machine) / 1e3:.1f} kB | {cost.chain:,} | {seconds * 1e6:.1f} |"
                )
            share = f"{100 * floor / total:.0f} % of the copy bandwidth"
            lines.append(f"| {keys:,} | {readers} | **all, {gap_us} between** | | | | **{total * 1e6:.1f}**, {share} |")
            reached[keys, readers] = (total, floor / total)
    spilled = [name for name, fact in facts.items() if fact["stack_bytes"] or fact["spills"]]
    lines.append(
        f"\nOf the kernels on record for sm90, {len(spilled)} spill. Below 18 kB in flight an H100 waits for memory."
    )
    short, long = reached[KEYS[0], 1][0], reached[KEYS[1], 1][1]
    said = (
        "missed"
        if short > GOAL_S and long < GOAL_SHARE
        else "met"
        if short <= GOAL_S and long >= GOAL_SHARE
        else "half met"
    )
    lines.append(
        f"\nThe goals for 1 reader are {said}: {short * 1e6:.1f} us at {KEYS[0]:,} keys, at most {GOAL_S * 1e6:.0f} us "
        f"wanted; {100 * long:.0f} % of the copy bandwidth at {KEYS[1]:,}, {100 * GOAL_SHARE:.0f} % wanted. What is in "
        "the way: two boundaries between launches, and memory that is idle while a row is summed in its one order, "
        "keys / 16 dependent additions."
    )
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def main() -> None:
    """Write the page."""
    record = json.loads((Path(__file__).parent / "table.json").read_text())
    PAGE.write_text(page(Machine(), exact_config("sm90"), record[max(record)]["sm90"]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
