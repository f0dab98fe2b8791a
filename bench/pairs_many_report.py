"""The page of the many pairs, from their JSON alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.tables import MISSING, markdown

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = "PAIRS_MANY.md"
NUDGES, RESAMPLES, SEED = 4, 10_000, 0
NUDGED = tuple(f"nudged-{seed}" for seed in range(NUDGES))
FAST = ("fast", "fast-scores", "fast-scores-p32", "fast-p32")
LEVEL = (2.5, 97.5)
Row = dict[str, Any]


def page(results: dict[str, Any], name: str) -> str:
    """Return the Markdown page."""
    machine, rows = results["machine"], results["pairs"]
    fresh = [row for row in rows if row["part"] != "eight"]
    host = ", ".join(f"{what} {machine[what]}" for what in ("torch", "transformers", "python"))
    parts = {part: sum(row["part"] == part for row in rows) for part in ("eight", "whole", "beginning")}
    return "\n\n".join((
        "# Many documents, a question each: fast, its variants and sdpa against eager",
        f"Written by `python -m bench.pairs_many` from [{name}]({name}): {machine['model']}; {machine['cpu']}, {host}; "
        f"{machine['stock_order']}. `fast` is {machine['fast']}.",
        "The ways are rows of one batch and differ in attention alone. All start from the KV that eager has made of "
        "the document, but for `sdpa-whole`, which starts from sdpa's. `eager` is transformers' own attention; the "
        "model's Linears, eager's too, are fp32 products of the bf16 numbers, rounded once: stock's take a minute or "
        "more a pair on this CPU. So eager's tokens here need not be those of PAIRS.md.",
        f"{len(rows)} pairs: the {parts['eight']} of [PAIRS.md](PAIRS.md), {parts['whole']} topics of Python's help, "
        f"whole, and {parts['beginning']} beginnings of longer topics, the latter two asked "
        f'"{machine["question"]}". The list was fixed before anything was counted. Four of its pairs were read on '
        "trial before: with stock Linears and with ways one by one, both given up as too slow, and in this form. The "
        "eight are what the question came from, so the intervals are given without them too.",
        "- `fast-scores`: scores are rounded to bf16, and again when scaled, as eager does\n"
        "- `fast-scores-p32`: the same, and the weights of V stay fp32\n"
        "- `fast-p32`: fast, and the weights of V stay fp32\n"
        "- `eager-resummed`: a control with all of eager's roundings, that of normalised weights among them, whose "
        "sums of products are fp32 in torch's order\n"
        "- `eager-again`: eager in another row of the batch\n"
        f"- `nudged`: eager with one in {machine['nudge_every']:,} of attention's outputs moved to a neighbouring "
        f"bf16 number, {NUDGES} seeds",
        "## Greedy tokens",
        '"kept": tokens that are eager\'s, position by position. "departures": pairs by how much more eager\'s logits '
        "give eager's own token than the one first taken instead: nothing, one step between neighbouring bf16 numbers, "
        'or more. "led": positions at which a way prefers eager\'s token when given eager\'s tokens until there. '
        '"same bits": outputs of attention that are eager\'s, on eager\'s q, K and V of question and answer.',
        markdown(*_ways(rows)),
        "## Are the differences chance?",
        f"Tokens kept by a way less those kept by sdpa, by sdpa-whole and by the mean of the nudged, summed over "
        f"pairs, with 95 % intervals of {RESAMPLES:,} resamples of pairs.",
        markdown(*_intervals(rows)),
        "No interval is widened for the number of comparisons. "
        f"All {len(_compared(rows))} ways at once (added when the counts had been seen): dealt out anew within each "
        f"pair, their counts make totals that spread as far as those above, or further, in {100 * _chance(rows):.0f} % "
        f"of {RESAMPLES:,} deals.",
        "Without the eight:",
        markdown(*_intervals(fresh)),
        "## Attention outputs against fp64",
        "On eager's q, K and V: outputs by their distance from fp64's result rounded to bf16, in steps between "
        "neighbouring bf16 numbers.",
        markdown(*_distances(rows, machine["bins"])),
    )) + "\n"  # fmt: skip


def _ways(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    total = sum(row["steps"] for row in rows)
    outputs = sum(row["outputs"] for row in rows)
    header = ["way", "kept", "pairs whole", "departures: ties", "one step", "more", "largest", "led", "same bits"]
    body = []
    for way in (way for way in rows[0]["equal"] if way != "eager"):
        parted = [row["parted"][way] for row in rows if way in row["parted"]]
        steps = [one["margin"] / one["spacing"] for one in parted]
        same = sum(row["same"][way] for row in rows) if way in rows[0]["same"] else None
        body.append([
            way, f"{_kept(rows, way):,.0f} of {total:,}", f"{len(rows) - len(parted)} of {len(rows)}",
            str(sum(step <= 0 for step in steps)), str(sum(0 < step <= 1 for step in steps)),
            str(sum(step > 1 for step in steps)), f"{max((one['margin'] for one in parted), default=0):g}",
            f"{sum(row['led'][way] for row in rows):,}",
            MISSING if same is None else f"{100 * same / outputs:.2f} %",
        ])  # fmt: skip
    return header, body


def _kept(rows: list[Row], way: str) -> float:
    return float(_per_pair(rows, way).sum())


def _per_pair(rows: list[Row], way: str, what: str = "equal") -> np.ndarray:
    ways = NUDGED if way == "nudged" else (way,)
    return np.array([[row[what][one] for one in ways] for row in rows], dtype=float).mean(axis=1)


def _intervals(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    against = ("sdpa", "sdpa-whole", "nudged")
    ways = [*FAST, "eager-resummed", "sdpa", "sdpa-whole", "nudged"]
    body = []
    for way in ways:
        cells = [_interval(_per_pair(rows, way) - _per_pair(rows, other)) if way != other else MISSING
                 for other in against]  # fmt: skip
        led = _interval(_per_pair(rows, way, "led") - _per_pair(rows, "sdpa", "led")) if way != "sdpa" else MISSING
        body.append([way, f"{_kept(rows, way):,.0f}", *cells, led])
    return ["way", "kept", *(f"less {other}'s" for other in against), "led, less sdpa's"], body


def _interval(differences: np.ndarray) -> str:
    low, high = interval(differences, np.sum)
    return f"{differences.sum():+.0f} ({low:+.0f} to {high:+.0f})"


def interval(values: np.ndarray, statistic: Callable[..., np.ndarray]) -> tuple[float, float]:
    """Return the 95 % interval of a statistic of pairs, by resampling them."""
    picks = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(statistic(values[picks], axis=1), LEVEL)
    return float(low), float(high)


def _compared(rows: list[Row]) -> list[str]:
    return [way for way in rows[0]["equal"] if way not in ("eager", "eager-again")]


def _chance(rows: list[Row]) -> float:
    kept = np.array([_per_pair(rows, way) for way in _compared(rows)])
    dealer = np.random.default_rng(SEED)
    spreads = [dealer.permuted(kept, axis=0).sum(axis=1).var() for _ in range(RESAMPLES)]
    return float(np.mean(np.array(spreads) >= kept.sum(axis=1).var()))


def _distances(rows: list[Row], bins: list[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for way in rows[0]["distances"]:
        counts = [sum(column) for column in zip(*(row["distances"][way] for row in rows), strict=True)]
        body.append([way, f"{sum(counts):,}", *(f"{100 * count / sum(counts):.2f} %" for count in counts)])
    return ["", "outputs", *(f"{name} ulp" for name in bins)], body
