"""One figure from the trimmed results: readers of a prefix, a decode step on its floor, attach against prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tables import label, number

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

Rows = dict[str, dict[str, Any]]
COLOURS = {"kvkern": "#0072B2", "eager": "#D55E00", "sdpa": "#E69F00"}
FLOOR = "#BBBBBB"
STOCK_NAMES = {"kvkern": "kvkern, exact", "eager": "stock eager", "sdpa": "stock sdpa"}


def draw(groups: dict[str, Rows], path: Path) -> None:
    """Draw the figure.

    Args:
        groups: rows by group and variant, `median` in seconds.
        path: the PNG to write.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(1, 1, 1.15), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    _readers(panels[0], groups["readers/qwen3-4b"])
    _step(panels[1], groups["decode-step"])
    _attach(panels[2], groups["attach-vs-prefill/3774"])
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _readers(panel: Axes, rows: Rows) -> None:
    for peer, colour in COLOURS.items():
        own = (row for name, row in rows.items() if name.startswith(f"{peer}-B"))
        points = sorted((row["readers"], 1e3 * row["median"]) for row in own)
        panel.plot(*zip(*points, strict=True), "o-", color=colour, label=STOCK_NAMES[peer])
        for readers, ms in points:
            panel.annotate(
                number(ms, 2), (readers, ms), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=colour
            )
    counts = sorted({row["readers"] for row in rows.values() if "readers" in row})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.margins(x=0.08, y=0.12)
    panel.set_xlabel("readers of one prefix")
    panel.set_ylabel("ms a layer (log scale)")
    panel.set_title("Decode attention, Qwen3-4B layer, 3,774 tokens")
    panel.legend(frameon=False)


def _step(panel: Axes, rows: Rows) -> None:
    floor = 1e3 * rows["no-op"]["median"]
    for place, peer in enumerate(COLOURS):
        total = 1e3 * rows[peer]["median"]
        panel.bar(place, floor, color=FLOOR, width=0.6, label="the step without attention" if place == 0 else None)
        panel.bar(place, total - floor, bottom=floor, color=COLOURS[peer], width=0.6)
        panel.annotate(number(total), (place, total), (0, 3), textcoords="offset points", ha="center")
    panel.set_xticks(range(len(COLOURS)), list(STOCK_NAMES.values()))
    panel.set_ylabel("ms a token")
    panel.set_title("Decode step, SmolLM2-135M, 3,774 tokens")
    panel.legend(frameon=False, loc="upper left")


def _attach(panel: Axes, rows: Rows) -> None:
    names = [name for name in rows if name != "kvkern-prefill"]
    for place, name in enumerate(reversed(names)):
        ms = 1e3 * rows[name]["median"]
        colour = COLOURS.get(name.split("-")[0], COLOURS["kvkern"])
        panel.barh(place, ms, color=colour, height=0.6)
        panel.annotate(f"{number(ms)} ms", (ms, place), (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    panel.set_xscale("log")
    panel.set_xlim(right=15e3 * max(row["median"] for row in rows.values()))
    panel.set_xlabel("ms (log scale)")
    panel.set_title("KV of 3,774 tokens, SmolLM2-135M")
