"""Roofline of decode attention from JSON alone: operations per byte from memory, against operations a second.

`python -m bench.roofline` draws the newest `results/*-cpu.json`; `python -m bench.roofline gpu.jsonl` what `bench.gpu`
has written. The roof is the bandwidth measured in the same run; no peak of the arithmetic was, so none is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
GROUP = "readers/qwen3-4b"
NAMES = {
    "kvkern": ("kvkern, exact C", "#0072B2"), "eager": ("stock eager", "#D55E00"), "sdpa": ("stock sdpa", "#E69F00"),
    "exact": ("kvkern, exact", "#0072B2"), "fast": ("kvkern, fast", "#009E73"),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measured call.

    Attributes:
        peer: a key of NAMES.
        readers: of one prefix.
        flops: of both products: 4 for each query head, channel and key, whoever shares what.
        bytes_moved: K and V that the call reads, q and out, each once.
        seconds: median.
    """

    peer: str
    readers: int
    flops: int
    bytes_moved: int
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes_moved

    @property
    def gflops(self) -> float:
        """GFLOP a second."""
        return self.flops / self.seconds / 1e9


def cpu_points(results: dict[str, Any]) -> tuple[list[Point], float]:
    """Return the calls of the CPU's JSON, and the bytes a second that were read beside them."""
    rows = results["groups"][GROUP]
    points = []
    for row in rows.values():
        if "readers" in row:
            batch, heads, head_dim, prefix, own = map(
                int, re.fullmatch(r"B(\d+)-Q(\d+)-KV\d+-D(\d+)-P(\d+)\+(\d+)", row["shape"]).groups()
            )
            flops = 4 * batch * heads * head_dim * (prefix + own)
            peer = row["variant"].partition("-")[0]
            points.append(Point(peer, row["readers"], flops, row["bytes_moved"], row["median"]))
    return points, 1e9 * rows["read"]["gbps"]


def gpu_points(lines: list[dict[str, Any]]) -> tuple[list[Point], float]:
    """Return the calls of `bench.gpu`'s rows, by graph replay where there was one, and the bytes a second of a copy."""
    points = []
    for row in lines:
        found = re.fullmatch(r"(exact|fast)-B(\d+)-P\d+", row["cell"]) if "flops" in row else None
        if found:
            us = row["graph_us"] or row["event_us"]
            points.append(Point(found[1], int(found[2]), row["flops"], row["bytes_moved"], us / 1e6))
    return points, 1e11 * max(row["gbps"] / row["percent_of_copy"] for row in lines if "percent_of_copy" in row)


def draw(points: list[Point], bytes_a_second: float, title: str, roof: str, path: Path) -> None:
    """Draw points under the roof."""
    figure, panel = plt.subplots(figsize=(7, 4.4), layout="constrained")
    ends = [min(p.intensity for p in points) / 1.6, max(p.intensity for p in points) * 1.6]
    label = f"{roof}, {bytes_a_second / 1e9:,.0f} GB/s"
    panel.plot(ends, [x * bytes_a_second / 1e9 for x in ends], color="#555555", label=label)
    for peer in dict.fromkeys(p.peer for p in points):
        own = sorted((p for p in points if p.peer == peer), key=lambda p: p.readers)
        name, colour = NAMES[peer]
        panel.plot([p.intensity for p in own], [p.gflops for p in own], "o", color=colour, label=name)
        texts: dict[tuple[int, int], list[Point]] = {}  # points that lie on each other share one
        for p in own:
            texts.setdefault((round(4 * math.log2(p.intensity)), round(8 * math.log10(p.gflops))), []).append(p)
        for here in texts.values():
            text, place = ", ".join(str(p.readers) for p in here), (here[0].intensity, here[0].gflops)
            panel.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("FLOP per byte from memory (log scale)")
    panel.set_ylabel("GFLOP/s (log scale)")
    panel.set_title(title)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw the newest CPU results, or a GPU's rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="?", help="of bench.gpu; the newest CPU results if left out")
    given = parser.parse_args()
    if given.rows is None:
        draw_cpu(json.loads(sorted(RESULTS.glob("*-cpu.json"))[-1].read_text()))
        return
    lines = [json.loads(line) for line in given.rows.read_text().splitlines()]
    title = f"Decode attention, readers of one prefix, {lines[-1]['device']}"
    draw(*gpu_points(lines), title, "copy bandwidth", given.rows.with_suffix(".png"))


def draw_cpu(results: dict[str, Any]) -> None:
    """Draw the CPU's results beside their JSON."""
    title = "Qwen3-4B layer, 3,774 keys, on a CPU: points by readers of one prefix"
    draw(*cpu_points(results), title, "read bandwidth, measured", RESULTS / "roofline.png")


if __name__ == "__main__":
    main()
