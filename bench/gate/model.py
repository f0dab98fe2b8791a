"""The predicted time of one exact decode layer on an H100: `python -m bench.gate.model`.

Written down before any measurement; `bench/gpu.py` prints it beside what a GPU then says. Scores and output take the
longest of four: bytes from HBM, bytes from the L2, both at what the machine gives or at what programs have asked for at
once, instructions, the longest chain; and once the latency. Readers of one prefix take its tiles from HBM once and from
L2 after that. Softmax is a row of steps that wait for each other, and so is what the last program of an output does:
both are counted in round trips to the L2, and so is a wait for another program. In one launch, memory goes on with V
while rows are summed; what is left to wait for at the end are the KV heads whose scores were the last to run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
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
        l1_latency_s: the same from the L1.
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
    l1_latency_s: float = 0.02e-6
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
        tile_bytes: of K or V from L2, the HBM bytes among them.
        scratch_bytes: from and to L2 besides.
        loading_bytes: of K or V that a warp loads at once; what several warps of a program ask for counts once.
        pulled_bytes: of K or V that a warp has asked the L2 for at once; 0 where programs do not pull.
        instructions: warp instructions, all programs together.
        chain: dependent additions or fmas of the longest path.
        steps_s: what comes one after the other besides: before, between or behind the above.
    """

    name: str
    programs: int
    warps: int
    fitting: int
    hbm_bytes: float
    tile_bytes: float
    scratch_bytes: float
    loading_bytes: float
    pulled_bytes: float
    instructions: float
    chain: int
    steps_s: float = 0.0

    def warps_per_sm(self, machine: Machine) -> float:
        """Warps that an SM has, over the whole launch."""
        return self.programs * self.warps / machine.sms

    def in_flight_per_sm(self, machine: Machine) -> float:
        """Bytes that an SM has asked HBM for at once."""
        return min(self.warps_per_sm(machine), self.fitting) * max(self.loading_bytes, self.pulled_bytes)

    def seconds(self, machine: Machine, *, of: float = 1.0, from_l2: bool = False) -> float:
        """Predicted time: `of` how much of it, and whether the L2 has the tiles already."""
        if not self.hbm_bytes:
            return self.steps_s
        latency = machine.l2_latency_s if from_l2 else machine.latency_s
        busy = min(self.programs * of, machine.sms)
        warps = min(self.warps_per_sm(machine) * of, self.fitting)
        asked = warps * max(self.loading_bytes, self.pulled_bytes) * machine.sms / machine.latency_s
        # What is not pulled comes over the same loads, which wait for HBM.
        loaded = warps * self.loading_bytes * machine.sms
        loaded /= machine.l2_latency_s if from_l2 or self.pulled_bytes else machine.latency_s
        hbm = 0 if from_l2 else of * self.hbm_bytes / min(machine.copy_bytes_s, asked)
        l2 = of * max((self.tile_bytes + self.scratch_bytes) / machine.l2_bytes_s, self.tile_bytes / loaded)
        schedulers = min(4, self.warps_per_sm(machine) * of * machine.sms / busy) * busy
        issue = of * self.instructions / (schedulers * machine.clock_hz)
        chain = self.chain * machine.add_cycles / machine.clock_hz
        return max(hbm, l2, issue, chain) + latency + self.steps_s


SCORE_ROW, SCORE_PAIR = 7, 10
"""Instructions of a pair of channels for 64 keys: of a row a load, widening and 4 fmas; of K, as compiled, the rest."""
OUTPUT_PAIR = 406 / 32
"""The same of a pair of keys for one row and 64 channels, as compiled: 128 fmas, 128 widenings, 96 loads and the rest
are a trip of 64 keys."""
EXP, PROBABILITY = 488 / 16, 221 / 16
"""Instructions for 32 keys, as compiled, a trip of 16 a lane: the exponential with its load and store; p with its."""


def costs(readers: int, keys: int, config: ExactConfig, registers: int, machine: Machine | None = None) -> list[Cost]:
    """Return the three phases' costs for readers of one prefix, one query each; `registers` of a thread."""
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
    fitting = min(64, config.warps * (65536 // (32 * config.warps * -(-registers // 8) * 8)))
    pulled_k, pulled_v = (2 * HEAD_DIM * many / config.warps * config.pull for many in (2 * config.score_words, RUN))
    return [
        Cost("score", score_programs, config.warps, fitting, half,
             half * readers * (GROUP // score_rows), 4 * rows * keys, trip * 128, pulled_k,
             score_programs * config.score_words // 32 * HEAD_DIM // 2 * (SCORE_PAIR + SCORE_ROW * score_rows),
             HEAD_DIM),
        Cost("softmax", rows * -(-keys // part), config.warps, fitting, 0, 0, 0, 0, 0, 0, -(-keys // 16),
             softmax_seconds(rows, keys, config, machine)),
        Cost("output", output_programs, config.warps, fitting, half,
             half * readers * blocks * (1 + ahead / RUN), 4 * rows * keys * pieces + 4 * rows * runs * HEAD_DIM,
             ahead * words * 4 / config.warps, pulled_v / pieces,
             output_programs * config.warps * (RUN + ahead) / 2 * OUTPUT_PAIR, RUN + ahead,
             fold * machine.l2_latency_s),
    ]  # fmt: skip


ARRIVE = 2
"""Round trips to the L2 of a program that counts itself: a fence, and an atomic."""
SEEN = 2.5
"""The same from a store to those who wait for it: a fence, an atomic's way there, half a look missed, a look's way
back. The last looks acquire."""
FIRST_LOADS = 3
"""That a program makes one after the other before it asks for K: its prefix, the prefix's length, the table."""
MAX_SUM_CYCLES = 200
"""For a row's maximum over warps, the last four additions and the division: assumed."""
SUM = 203 * 4 / 64
"""Instructions for 32 keys of the sum, as compiled: each of four warps has 203 for 2,048 keys."""


def last_heads(cost: Cost, machine: Machine) -> float:
    """Share of the KV heads whose scores run at the end, all at once."""
    resident = machine.sms * cost.fitting // cost.warps
    return min(KV_HEADS, -(-resident * KV_HEADS // cost.programs)) / KV_HEADS


def seconds(readers: int, keys: int, config: ExactConfig, registers: int) -> float:
    """Predict a layer."""
    machine = Machine()
    score, softmax, output = costs(readers, keys, config, registers, machine)
    # Where the L1 is asked for what all programs read first, that comes while they draw their tickets.
    first = FIRST_LOADS * (machine.l1_latency_s if config.warm else machine.l2_latency_s)
    if config.launches > 1:
        phases = sum(cost.seconds(machine) + machine.l2_latency_s + first for cost in (score, softmax, output))
        return phases + 2 * machine.boundary_s
    share = last_heads(score, machine)
    rows = int(readers * GROUP * KV_HEADS * share)
    summed = 2 * SEEN * machine.l2_latency_s + softmax_seconds(rows, keys, config, machine)
    # Meanwhile V comes, where programs ask for it: all that the last heads need, as long as there is the time.
    has_come = config.pull and summed * machine.copy_bytes_s >= share * output.hbm_bytes
    ending = output
    if sum(cost.programs * cost.warps for cost in (score, softmax, output)) <= machine.sms * output.fitting:
        asked = RUN / (RUN + config.output_tiles * TILE)  # all programs are there, and ask for V before they wait
        ending = replace(
            output, instructions=output.instructions * asked, tile_bytes=output.tile_bytes * asked, chain=RUN
        )
    tail = summed + ending.seconds(machine, of=share, from_l2=has_come)
    # The softmax of the other heads takes the place of instructions of outputs.
    exponentials = readers * GROUP * KV_HEADS * keys / 32 * (EXP + SUM + PROBABILITY) * (1 - share)
    in_scratch = output.scratch_bytes + 16 * readers * GROUP * KV_HEADS * keys * (1 - share)
    busy = replace(output, instructions=output.instructions + exponentials, scratch_bytes=in_scratch).seconds(machine)
    begun = machine.l2_latency_s + first  # a ticket
    return begun + score.seconds(machine) + max(tail, busy) + ARRIVE * machine.l2_latency_s


def softmax_seconds(rows: int, keys: int, config: ExactConfig, machine: Machine) -> float:
    """Scores and maxima arrive; exponentials; arriving, if there are parts; the sum; p."""
    part = config.softmax_keys * config.softmax_passes
    parts = -(-keys // part)
    rows_of_sm, parts_of_sm = -(-rows // machine.sms), -(-rows * parts // machine.sms)
    exponentials = parts_of_sm * min(keys, part) / 32 * EXP / 4 / machine.clock_hz
    # A trip of the sum asks for what the next one adds, and lasts until that is there; the first adds nothing.
    trip = max(config.softmax_steps * machine.add_cycles / machine.clock_hz, machine.l2_latency_s)
    sums = (1 + -(-keys // (16 * config.softmax_steps))) * trip
    # p is stored while e of the next keys comes, from the L1, where the sum has left it.
    store = rows_of_sm * max(keys / 32 * PROBABILITY / 4, keys * 8 / machine.sm_bytes_cycle) / machine.clock_hz
    last = store + -(-keys // config.softmax_keys) * machine.l1_latency_s
    trips = 1 + (ARRIVE if parts > 1 else 0)
    return exponentials + sums + last + MAX_SUM_CYCLES / machine.clock_hz + trips * machine.l2_latency_s


def verdict(reached: float) -> str:
    """Say whether a goal is met of which this share is reached; within a tenth, assumptions decide nothing."""
    return "too close to tell" if 1 / 1.1 < reached < 1.1 else "met" if reached > 1 else "missed"


def page(config: ExactConfig, registers: int) -> str:
    """Return the Markdown page."""
    machine = Machine()
    lines = [
        "# Predictions for one exact decode layer on an H100",
        "Written by `python -m bench.gate.model` from the launch configuration and the compiled kernel's registers, "
        "before any measurement. No GPU has been at hand: nothing here is measured. Qwen3-4B layer (32 query heads, 8 "
        "KV heads, head_dim 128), one query a reader, one prefix for all readers.",
        f"Assumed: {machine.sms} SMs at {machine.clock_hz / 1e9} GHz, copy bandwidth {machine.copy_bytes_s / 1e12} "
        f"TB/s, L2 {machine.l2_bytes_s / 1e12} TB/s, latency {machine.latency_s * 1e6:.2f} us, from L2 "
        f"{machine.l2_latency_s * 1e6:.2f} us, from L1 {machine.l1_latency_s * 1e6:.2f} us, {machine.add_cycles} "
        f"cycles a dependent fma, {MAX_SUM_CYCLES} for what ends a row's maximum and sum, {machine.sm_bytes_cycle} "
        f"bytes a cycle between an SM and L2; until another program sees what was stored pass {SEEN} trips to the L2; "
        f"between two launches in a graph pass {machine.boundary_s * 1e6:.1f} us. Instructions are counted in the "
        "compiled kernel by hand. Warps that ask for the same V bytes count them once. The time of a phase "
        "is that of the phase alone; in one launch softmax runs while K of other heads and V are read. One launch is "
        "taken never to leave the memory idle between K and V, pulls to run at the copy bandwidth, words of q, e and p "
        "to be in the L1 when they are used, and scratch to stay in the L2 (8 readers of 32,768 keys have 42 MB, "
        "beside K and V, which does not): its figures are the best to be hoped for.",
        "| keys | readers | phase | warps per SM | K or V bytes in flight per SM | longest chain | predicted us |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    reached: dict[tuple[int, int], tuple[float, float]] = {}
    for keys in KEYS:
        for readers in READERS:
            floor = 2 * keys * KV_HEADS * HEAD_DIM * 2 / machine.copy_bytes_s
            for cost in costs(readers, keys, config, registers):
                lines.append(
                    f"| {keys:,} | {readers} | {cost.name} | {cost.warps_per_sm(machine):.1f} | "
                    f"{cost.in_flight_per_sm(machine) / 1e3:.1f} kB | {cost.chain:,} | "
                    f"{cost.seconds(machine) * 1e6:.1f} |"
                )
            total = seconds(readers, keys, config, registers)
            three = seconds(readers, keys, replace(config, launches=3), registers)
            lines.append(
                f"| {keys:,} | {readers} | **one launch** | | | | **{total * 1e6:.1f}**, {100 * floor / total:.0f} % "
                f"of the copy bandwidth; three launches {three * 1e6:.1f} |"
            )
            reached[keys, readers] = (total, floor / total)
    lines.append("\nBelow 18 kB in flight an H100 waits for memory.")
    short, long = reached[KEYS[0], 1][0], reached[KEYS[1], 1][1]
    lines.append(
        f"\nThe goals for 1 reader, by this prediction: {short * 1e6:.1f} us at {KEYS[0]:,} keys, at most "
        f"{GOAL_S * 1e6:.0f} us wanted: {verdict(GOAL_S / short)}; {100 * long:.0f} % of the copy bandwidth at "
        f"{KEYS[1]:,}, {100 * GOAL_SHARE:.0f} % wanted: {verdict(long / GOAL_SHARE)}. What is in the way: at "
        f"{KEYS[0]:,} keys two results that are passed on, and the row that is summed in its one order, keys / 16 "
        "dependent additions; with more readers, instructions: every reader has its own chains, and what they share is "
        "bytes alone."
    )
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n"


def registers_on_record(version: str = "") -> int:
    """Registers of the kernel on sm90, of this version of Triton or of the latest on record."""
    record = json.loads((Path(__file__).parent / "table.json").read_text())
    latest = max(record, key=lambda name: [int(part) for part in name.split(".")])
    return record.get(version, record[latest])["sm90"]["exact/G4-D128"]["registers"]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(exact_config("sm90"), registers_on_record()))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
