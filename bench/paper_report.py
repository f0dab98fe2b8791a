"""From the JSON of `bench.paper_table` alone: the table, and a plot beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.tables import markdown, number

if TYPE_CHECKING:
    from pathlib import Path

SOURCES = ("later open", "first open", "disk")
Row = dict[str, Any]


def write(source: Path) -> None:
    """Write PAPER.md and paper.png beside the JSON."""
    results = json.loads(source.read_text())
    _draw(results["rows"], source.with_name("paper.png"))
    text = report(results, source.name)
    source.with_name("PAPER.md").write_text(text)
    print(text)


def report(results: dict[str, Any], name: str) -> str:
    """Return the Markdown page."""
    machine, rows = results["machine"], results["rows"]
    host = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    model = f"{machine['weights']} weights, {machine['layers']} layers, bf16, transformers {machine['transformers']}"
    run = f"A question of {machine['question_tokens']} tokens, {machine['steps']} greedy tokens"
    luck = (
        " With random weights the logits lie so close together that which token comes first is a matter of luck once a "
        "bit differs: the last two columns say nothing about real weights."
    )
    parts = [
        "# Prefill from scratch against attach and continue: Qwen3-4B",
        "The question of arXiv 2606.13361, asked of this machine. Written by `python -m bench.paper_table --report` "
        f"from [{name}]({name}): {host}; {model}. {run}. One run a row, on a CPU; no GPU was at hand, and nothing is "
        "said of one. 32,768 tokens were not run: their prefill would take hours here.",
        "`stock` is Hugging Face's default, sdpa; `contract` is the whole model under the numeric contract, from "
        "scratch and attached. Tokens and logits of the attached run are compared with both.",
        markdown(*_times(rows, machine["steps"])),
        "`x` is the speed of attaching in times of stock's prefill, until the first token; 1 or less loses. `later "
        "open`: mapped and verified before; `first open`: from the page cache, every byte through SHA-256; `disk`: the "
        "same after the page cache was dropped. A first open in a process also hashes the weights once, "
        f"{number(machine['weights_digest_s'])} s, which no row counts.",
        markdown(*_bits(rows, machine["steps"])),
        "The tokens after the first agree with the contract's in every bit of their logits; stock sdpa computes with "
        f"other bits.{luck if machine['weights'] == 'random' else ''}",
        markdown(*_worth(rows)),
        "`pays after`: how many readers it takes until one prefill under the contract, published, and an attach for "
        "each of them (loaded by a first open) is cheaper than stock's prefill for each. `worth fetching above`: the "
        "bandwidth from which on loading the document beats computing it.",
        "![time to the first token](paper.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _times(rows: list[Row], steps: int) -> tuple[list[str], list[list[str]]]:
    header = ["tokens", "stock prefill s", "contract prefill s", "attached question s", "x, load excluded"]
    header += [text for source in SOURCES for text in (f"load s, {source}", f"x, {source}")]
    header += [f"{steps - 1} more tokens s: stock", "contract", "attached"]
    body = []
    for row in rows:
        stock, own = row["stock"]["first_s"], row["attached"]["first_s"]
        cells = [
            f"{row['tokens']:,}",
            number(stock),
            number(row["contract"]["first_s"]),
            number(own),
            number(stock / own),
        ]
        for source in SOURCES:
            load = row["load_s"][source]
            cells += [number(load), number(stock / (own + load))]
        cells += [number(row[way]["steps_s"]) for way in ("stock", "contract", "attached")]
        body.append(cells)
    return header, body


def _bits(rows: list[Row], steps: int) -> tuple[list[str], list[list[str]]]:
    header = [
        "tokens",
        "tokens equal to contract's",
        "rows of logits",
        "tokens equal to stock sdpa's",
        "rows of logits",
    ]
    body = []
    for row in rows:
        cells = [f"{row['tokens']:,}"]
        for other in ("contract", "stock"):
            equal = (row[f"{what}_equal_{other}"] for what in ("tokens", "logits"))
            cells += [f"{count} of {steps}" for count in equal]
        body.append(cells)
    return header, body


def _worth(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["tokens", "document MB", "publish s", "pays after", "worth fetching above"]
    body = []
    for row in rows:
        publish = row["contract"]["first_s"] + row["put_s"]
        saved = row["stock"]["first_s"] - row["attached"]["first_s"]
        gain = saved - row["load_s"]["first open"]
        reads = f"{number(publish / gain, 2)} readers" if gain > 0 else "never"
        rate = f"{number(row['payload_bytes'] / saved / 1e6)} MB/s" if saved > 0 else "never"
        body.append([f"{row['tokens']:,}", number(row["payload_bytes"] / 1e6), number(publish), reads, rate])
    return header, body


def _draw(rows: list[Row], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    lines = {
        "stock sdpa, prefill": [row["stock"]["first_s"] for row in rows],
        "contract, prefill": [row["contract"]["first_s"] for row in rows],
        **{f"attached, {s}": [row["attached"]["first_s"] + row["load_s"][s] for row in rows] for s in SOURCES},
    }
    colours = ("#E69F00", "#56B4E9", "#0072B2", "#009E73", "#555555")
    for (name, seconds), colour in zip(lines.items(), colours, strict=True):
        panel.plot(tokens, seconds, "o-", label=name, color=colour)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(tokens, [f"{n:,}" for n in tokens])
    panel.minorticks_off()
    panel.set_xlabel("tokens of the document")
    panel.set_ylabel("s to the first token (log scale)")
    panel.set_title("Qwen3-4B on two cores")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
