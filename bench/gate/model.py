"""The predicted time of one exact decode layer on an H100: `python -m bench.gate.model`.

Written down before any measurement; `bench/gpu.py` prints it beside what a GPU then says. A kernel takes the longest of
four: its bytes at the copy bandwidth, its bytes at what its warps have in flight, its instructions, its longest chain;
and once the latency of memory. Readers of one prefix take its tiles from HBM once and from L2 after that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvkern.kernels.launch_config import ExactConfig, exact_config

GROUP, KV_HEADS, HEAD_DIM, TILE, RUN = 4, 8, 128, 64, 512
READERS, KEYS = (1, 2, 4, 8), (3774, 32768)
PAGE = Path(__file__).parent / "PREDICTIONS.md"


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU; none of it was measured here.

    Attributes:
        sms: streaming multiprocessors.
        clock_hz: boost clock.
        copy_bytes_s: copy bandwidth that others have measured.
        latency_s: from a load to its data, from HBM.
        add_cycles: of a dependent addition or fma.
        boundary_s: between two launches inside a graph.
        l2_bytes_s: bandwidth of the L2.
    """

    sms: int = 132
    clock_hz: float = 1.755e9
    copy_bytes_s: float = 3.0e12
    latency_s: float = 0.45e-6
    add_cycles: int = 4
    boundary_s: float = 1.3e-6
    l2_bytes_s: float = 5.5e12


@dataclass(frozen=True)
class Cost:
    """One kernel of a call.

    Attributes:
        name: the kernel.
        programs: of one warp, or as many warps as `warps` says, each.
        warps: of a program.
        hbm_bytes: from and to HBM.
        l2_bytes: from L2, the HBM bytes among them.
        in_flight_bytes: of K or V, per warp.
        instructions: warp instructions, all programs together.
        chain: dependent additions or fmas of the longest path.
        in_phases: whether memory, instructions and chain come one after the other.
    """

    name: str
    programs: int
    warps: int
    hbm_bytes: float
    l2_bytes: float
    in_flight_bytes: float
    instructions: float
    chain: int
    in_phases: bool = False

    def warps_per_sm(self, machine: Machine) -> float:
        """Warps that an SM has, over the whole launch."""
        return self.programs * self.warps / machine.sms

    def in_flight_per_sm(self, machine: Machine) -> float:
        """Bytes that an SM has asked for at once; no more than 64 warps fit."""
        return min(self.warps_per_sm(machine), 64) * self.in_flight_bytes

    def seconds(self, machine: Machine) -> float:
        """Predicted time, launch excluded."""
        busy = min(self.programs, machine.sms)
        flowing = self.in_flight_per_sm(machine) * machine.sms / machine.latency_s
        memory = max(self.hbm_bytes / machine.copy_bytes_s, self.l2_bytes / min(machine.l2_bytes_s, flowing))
        issue = self.instructions / (min(4, self.warps_per_sm(machine) * machine.sms / busy) * busy * machine.clock_hz)
        chain = self.chain * machine.add_cycles / machine.clock_hz
        parts = (memory, issue, chain)
        return (sum(parts) if self.in_phases else max(parts)) + machine.latency_s


def costs(readers: int, keys: int, config: ExactConfig, facts: dict[str, dict[str, int]]) -> list[Cost]:
    """Return the four kernels' costs for readers of one prefix, one query each."""
    tiles, runs = -(-keys // TILE), -(-keys // RUN)
    rows, half = readers * GROUP * KV_HEADS, keys * KV_HEADS * HEAD_DIM * 2
    trip = min(2 * config.score_unroll, HEAD_DIM)
    score_programs = readers * KV_HEADS * -(-tiles * TILE // (2 * config.score_words))
    pieces = HEAD_DIM // 2 // config.output_words
    score_rows, output_rows = min(config.score_rows, GROUP), min(config.output_rows, GROUP)
    score_programs *= GROUP // score_rows
    output_programs = readers * KV_HEADS * pieces * runs * (GROUP // output_rows)
    # Instructions of a pair: loads of two words of K or V and a word of q or p a row; widening; 4 fmas a row.
    score_pair, output_pair = (2 + rows + 4 + 2 * rows + 4 * rows for rows in (score_rows, output_rows))
    return [
        Cost("score", score_programs, config.score_warps, half, half * readers + 2 * rows * keys, trip * 128,
             score_programs * HEAD_DIM // 2 * score_pair, HEAD_DIM),
        Cost("softmax", rows, config.softmax_warps, 0, rows * keys * (2 + 2 + 4 + 4 + 4 + 2),
             facts["softmax/G4"]["in_flight_bytes"],
             rows * keys / 32 * 45 + rows * config.softmax_warps * keys / 16 * 2, -(-keys // 16), in_phases=True),
        Cost("output", output_programs, config.output_warps, half,
             half * readers * (GROUP // output_rows) + 2 * rows * keys * pieces,
             TILE * config.output_words * 4, output_programs * RUN / 2 * output_pair, RUN),
        Cost("fold", rows, config.fold_warps, 0, 4 * rows * runs * HEAD_DIM, 4 * HEAD_DIM * config.fold_runs,
             rows * runs * 8, runs),
    ]  # fmt: skip


def page(machine: Machine, config: ExactConfig, facts: dict[str, dict[str, int]]) -> str:
    """Return the Markdown page."""
    gap_us = f"{machine.boundary_s * 1e6:.1f} us"
    lines = [
        "# Predictions for one exact decode layer on an H100",
        "Written by `python -m bench.gate.model` from the launch configuration and the compiled kernels' facts, before "
        "any measurement. No GPU has been at hand: nothing here is measured. Qwen3-4B layer (32 query heads, 8 KV "
        "heads, head_dim 128), one query a reader, one prefix for all readers.",
        f"Assumed: {machine.sms} SMs at {machine.clock_hz / 1e9} GHz, copy bandwidth {machine.copy_bytes_s / 1e12} "
        f"TB/s, L2 {machine.l2_bytes_s / 1e12} TB/s, latency {machine.latency_s * 1e6:.2f} us, {gap_us} between "
        f"launches in a graph, {machine.add_cycles} cycles a dependent fma. A softmax program works in phases, one row "
        "on one SM.",
        "| keys | readers | kernel | warps per SM | K or V bytes in flight per SM | longest chain | predicted us |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for keys in KEYS:
        for readers in READERS:
            total, floor = 3 * machine.boundary_s, 2 * keys * KV_HEADS * HEAD_DIM * 2 / machine.copy_bytes_s
            for cost in costs(readers, keys, config, facts):
                seconds = cost.seconds(machine)
                total += seconds
                lines.append(
                    f"| {keys:,} | {readers} | {cost.name} | {cost.warps_per_sm(machine):.1f} | "
                    f"{cost.in_flight_per_sm(machine) / 1e3:.1f} kB | {cost.chain:,} | {seconds * 1e6:.1f} |"
                )
            share = f"{100 * floor / total:.0f} % of the copy bandwidth"
            lines.append(f"| {keys:,} | {readers} | **all, {gap_us} between** | | | | **{total * 1e6:.1f}**, {share} |")
    spilled = [name for name, fact in facts.items() if fact["stack_bytes"] or fact["spills"]]
    lines.append(
        f"\nOf the kernels on record for sm90, {len(spilled)} spill. Below 18 kB in flight an H100 waits for memory."
    )
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def main() -> None:
    """Write the page."""
    record = json.loads((Path(__file__).parent / "table.json").read_text())
    PAGE.write_text(page(Machine(), exact_config("sm90"), record[max(record)]["sm90"]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
