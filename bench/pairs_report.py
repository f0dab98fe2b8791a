"""The page of the eight pairs, from their JSON alone."""

from __future__ import annotations

from typing import Any

from bench.tables import MISSING, markdown

PAGE = "PAIRS.md"
WAYS = ("fast", "sdpa", "sdpa-whole")
LED = ("fast", "sdpa")
NEAR = 0.125
COMPUTED = ("fast", "sdpa", "eager")
Row = dict[str, Any]


def page(results: dict[str, Any], name: str) -> str:
    """Return the Markdown page."""
    machine, rows = results["machine"], results["pairs"]
    host = ", ".join(f"{what} {machine[what]}" for what in ("torch", "triton", "transformers", "python"))
    parts = [
        "# Eight documents, a question each: fast and sdpa against stock eager",
        f"Written by `python -m bench.pairs` from [{name}]({name}): {machine['model']}; {machine['cpu']}, {host}; "
        f"{machine['stock_order']}. The documents are topics of Python's help, whole; the list is in "
        "[tests/support/pairs.py](../../tests/support/pairs.py).",
        f"No GPU was at hand. `fast` ran in {machine['fast']}. A GPU's tensor cores multiply the same bf16 and add in "
        "an order of their own, so these are figures of the profile's arithmetic, not of a GPU.",
        "## Greedy tokens equal to stock eager's, position by position",
        "Each way reads the question in one chunk and goes on greedily. `eager` and `sdpa` start from the KV that "
        "stock eager has made of the document (a DynamicCache), `fast` from the same KV, published and attached "
        '(`kvkern.patch(model, profile="fast")`); `sdpa-whole` has made the document\'s KV with sdpa too. "leaves at" '
        "is the first differing token, with how much larger eager's logit of its own token is than that of the token "
        "taken: logits are bf16, so 0 is a tie, and 0.125 one step between neighbours from 16 on.",
        markdown(*_tokens(rows)),
        _noise(results["nudged"], sum(row["steps"] for row in rows)),
        "## Led by eager's tokens",
        "One way's first other token makes all that follow another text, so the counts above hang on few decisions. "
        "Here each way, eager too, reads the question and eager's tokens in one chunk, and is asked for its best token "
        "at each of the positions. `ties`: positions at which eager's own two best logits are equal, so that its token "
        "is the one with the smaller id; `near`: at most 0.125 apart, ties among them. RMS is of the difference of all "
        "logits from eager's. (This count was added when the plain counts of two pairs had been seen, the nudges when "
        "six had been; documents and questions stayed as they were.)",
        markdown(*_led(rows)),
        "## Attention outputs against fp64",
        "On the q, K and V of every layer and call of the fast way (the question's rows and each step): outputs by "
        "their distance from fp64's result rounded to bf16, in steps between neighbouring bf16 numbers. `sdpa` and "
        "`eager` are transformers' own functions on the same q, K and V.",
        markdown(*_distances(rows, machine["bins"])),
        "The same, pair by pair: outputs that are fp64's rounding, and outputs that are further than one step from it.",
        markdown(*_distances_of_pairs(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _noise(nudged: dict[str, Any], total: int) -> str:
    kept = sorted(nudged["equal"])
    return (
        f"How much of that is chance: stock eager itself, with one in {nudged['every']:,} of attention's outputs moved "
        f"to a neighbouring bf16 number, keeps {kept[0]} to {kept[-1]} of its own {total} tokens over {len(kept)} "
        f"seeds ({', '.join(map(str, kept))})."
    )


def _tokens(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["document", "tokens", "question", *(text for way in WAYS for text in (way, "leaves at"))]
    body = []
    for row in rows:
        cells = [f"`{row['topic']}`", str(row["document_tokens"]), str(row["question_tokens"])]
        for way in WAYS:
            parted = row["parted"].get(way)
            left = f"{parted['step'] + 1}, by {parted['margin']:g}" if parted else MISSING
            cells += [f"{row['equal'][way]} of {row['steps']}", left]
        body.append(cells)
    total = sum(row["steps"] for row in rows)
    sums = [text for way in WAYS for text in (f"{sum(row['equal'][way] for row in rows)} of {total}", "")]
    return header, [*body, ["all", "", "", *sums]]


def _led(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["document", *LED, "ties", "near", *(f"RMS, {way}" for way in LED)]
    body, sums = [], [0] * (len(LED) + 2)
    for row in rows:
        near = [sum(gap <= most for gap in row["gaps"]) for most in (0, NEAR)]
        counts = [*(row["led"][way] for way in LED), *near]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        body.append([f"`{row['topic']}`", *_of(counts, row["steps"]), *(f"{row['rms'][way]:.4f}" for way in LED)])
    total = sum(row["steps"] for row in rows)
    rms = [(sum(row["rms"][way] ** 2 for row in rows) / len(rows)) ** 0.5 for way in LED]
    return header, [*body, ["all", *_of(sums, total), *(f"{x:.4f}" for x in rms)]]


def _of(counts: list[int], total: int) -> list[str]:
    return [*(f"{count} of {total}" for count in counts[: len(LED)]), *map(str, counts[len(LED) :])]


def _distances(rows: list[Row], bins: list[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for way in COMPUTED:
        counts = [sum(column) for column in zip(*(row["distances"][way] for row in rows), strict=True)]
        body.append([way, f"{sum(counts):,}", *(_percent(count, sum(counts)) for count in counts)])
    return ["", "outputs", *(f"{name} ulp" for name in bins)], body


def _distances_of_pairs(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["document", "outputs", *(f"{way}, {what}" for what in ("0 ulp", "over 1 ulp") for way in COMPUTED)]
    body = []
    for row in rows:
        counts = [row["distances"][way] for way in COMPUTED]
        cells = [_percent(own[0], sum(own)) for own in counts] + [_percent(sum(own[2:]), sum(own)) for own in counts]
        body.append([f"`{row['topic']}`", f"{sum(counts[0]):,}", *cells])
    return header, body


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.2f} %"
