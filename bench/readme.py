"""The few numbers of the README, written between its markers from the same JSON as the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import MISSING, bits, markdown, number

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"
# (what, group of the JSON, kvkern's variant, eager's, sdpa's)
ATTACH = "attach-vs-prefill/3774"
LINES = (
    ("decode attention, Qwen3-4B layer, 3,774 keys, 1 reader", "decode-attention/qwen3-4b", "kvkern", "eager", "sdpa"),
    ("the same, 8 readers of one prefix", "readers/qwen3-4b", "kvkern-B8", "eager-B8", "sdpa-B8"),
    ("decode step of SmolLM2-135M after 3,774 tokens", "decode-step", "kvkern", "eager", "sdpa"),
    ("the same step, scope `model`: the contract's own bits", "decode-step", "kvkern-model", "eager", "sdpa"),
    ("the same step with no attention, mask or cache", "decode-step", "no-op", "", ""),
    ("get 3,774 tokens: first open against prefill", ATTACH, "first-open", "eager-prefill", "sdpa-prefill"),
    ("get 3,774 tokens: later open against prefill", ATTACH, "later-open", "eager-prefill", "sdpa-prefill"),
    ("prefill of 3,774 tokens", ATTACH, "kvkern-prefill", "eager-prefill", "sdpa-prefill"),
)  # fmt: skip


def numbers(groups: dict[str, Any]) -> str:
    """Return the README's table."""

    def cell(rows: dict[str, Any], variant: str, ours: float) -> str:
        if variant not in rows:
            return MISSING
        median = rows[variant]["median"]
        return f"{_ms(median)} ({number(median / ours)}x)"

    body = []
    for what, group, ours, eager, sdpa in LINES:
        rows = groups[group]
        median = rows[ours]["median"]
        is_claimed = ours not in ("no-op",)
        body.append([what, _ms(median), cell(rows, eager, median), cell(rows, sdpa, median),
                     bits(rows[ours], rows) if is_claimed else MISSING])  # fmt: skip
    return markdown(["ms, medians (times kvkern's)", "kvkern", "HF eager", "HF sdpa", "Bits against eager"], body)


def fill(groups: dict[str, Any]) -> None:
    """Write the table between the README's markers."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{numbers(groups)}\n{END}{rest.split(END)[1]}")


def _ms(seconds: float) -> str:
    return number(1e3 * seconds)
