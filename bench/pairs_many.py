"""Many documents with a question each: the tokens that fast, variants of it and sdpa share with eager.

`python -m bench.pairs_many` reads them all in one process and writes JSON after each pair, Markdown at the end; pairs
that the JSON has already are not read again. The fast profile is a torch twin of the kernel's arithmetic.

The list, fixed before anything was counted: the eight pairs of `bench.pairs`; every topic of Python's help of 150 to
900 tokens, whole; and of every longer topic the paragraphs that 600 tokens hold, if these are 150 or more. The latter
two are asked one question, made of the topic's name. `--every K` reads each K-th pair of the list.

The ways are the rows of one batch, so that nothing but attention tells them apart. The model's Linears, which no way
of attending touches, multiply the same bf16 numbers as fp32 and round once: on a CPU without bf16 instructions stock's
own take a minute or more a pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from bench.pairs import RESULTS, machine  # sets the environment
from bench.pairs_many_report import NUDGES, PAGE, page
from bench.tables import write_page
from kvkern.model_patch.load import load_model
from tests.support.distances import BINS, histogram
from tests.support.fast_twin import RESUMMED, TWINS, resummed, twin
from tests.support.models import greedy_stock, stock_cache
from tests.support.pairs import (
    NUDGE_EVERY,
    PAIRS,
    STEPS,
    Pair,
    encoded,
    nudge,
    parting,
    prefilled,
    reference,
    stock_sdpa,
)
from tests.support.stock import eager_attention

QUESTION = "What does Python's documentation say about {topic}?"
WHOLE, BEGINNING = (150, 900), 600
BY_ROW = "by_row"
COMPARED = (*TWINS, RESUMMED, "sdpa", "eager")
Encode = Callable[[str], list[int]]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Listed(Pair):
    """A pair made by rule.

    Attributes:
        text: the topic, or its beginning.
        part: `eight`, `whole` or `beginning`.
    """

    text: str
    part: str

    @property
    def document(self) -> str:
        """The text read."""
        return self.text


def main() -> None:
    """Read the pairs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="read each K-th pair of the list only")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-pairs-many.json")
    given = parser.parse_args()
    model, tokenizer = load_model("smollm2")
    encode: Encode = lambda text: tokenizer(text).input_ids  # noqa: E731
    sum_in_fp32(model)
    host = json.loads(json.dumps(about()))
    results = json.loads(given.out.read_text()) if given.out.exists() else {"machine": host, "pairs": []}
    assert results["machine"] == host, "other pairs were read elsewhere"
    known = {(found["part"], found["topic"]) for found in results["pairs"]}
    for pair in listed(encode)[:: given.every]:
        if (pair.part, pair.topic) not in known:
            start = time.perf_counter()
            found = row(model, pair, encode)
            found["seconds"] = round(time.perf_counter() - start, 1)
            print(f"{pair.part}, {pair.topic}: {found['equal']}; {found['seconds']} s", flush=True)
            results["pairs"].append(found)
            given.out.write_text(json.dumps(results) + "\n")
    write_page(given.out, PAGE, page)


def sum_in_fp32(model: PreTrainedModel) -> None:
    """Let every Linear multiply the same bf16 numbers as fp32 and round the sum."""

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x.float() @ weight.T).bfloat16()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            module.forward = partial(forward, weight=module.weight.detach().float())


def listed(encode: Encode) -> list[Listed]:
    """Return all pairs: the eight, then whole topics, then beginnings of longer ones, by name."""
    eight = [Listed(pair.topic, pair.tokens, pair.question, pair.document, "eight") for pair in PAIRS]
    whole, beginnings = [], []
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        tokens, part, question = len(encode(text)), whole, QUESTION.format(topic=topic)
        if tokens > WHOLE[1]:
            text, part = beginning(text, encode), beginnings
            tokens = len(encode(text))
        if tokens >= WHOLE[0]:
            part.append(Listed(topic, tokens, question, text, "whole" if part is whole else "beginning"))
    return [*eight, *whole, *beginnings]


def beginning(text: str, encode: Encode) -> str:
    """Return the first paragraphs, as many as fit."""
    paragraphs, kept = text.split("\n\n"), ""
    for count in range(1, len(paragraphs) + 1):
        longer = "\n\n".join(paragraphs[:count])
        if len(encode(longer)) > BEGINNING:
            break
        kept = longer
    return kept


def row(model: PreTrainedModel, pair: Listed, encode: Encode) -> dict[str, Any]:
    """Read one pair, the ways being the rows of one batch: greedily, then led by eager's tokens."""
    document, question = encoded(pair, encode)
    model.set_attn_implementation("sdpa")
    whole = prefilled(model, document)
    model.set_attn_implementation("eager")
    cache = stock_cache(model, document)
    ways = attentions(len(document))
    cache.batch_repeat_interleave(len(ways))
    for shared, own in zip(cache.layers, whole.layers, strict=True):
        for all_rows, one in ((shared.keys, own.keys), (shared.values, own.values)):
            all_rows[list(ways).index("sdpa-whole")] = one[0]
    with attending(model, ways, compare=False):
        logits, chosen = greedy_stock(model, copy.deepcopy(cache), document, [question] * len(ways), STEPS)
    tokens = dict(zip(ways, chosen.tolist(), strict=True))
    eager = tokens["eager"]
    chunk = torch.tensor([question + eager[:-1]] * len(ways))
    with attending(model, ways, compare=True) as compared, torch.inference_mode():
        led = model(input_ids=chunk, past_key_values=cache, logits_to_keep=STEPS).logits
    parted = {way: parting(logits[0], tokens[way], eager) for way in ways if tokens[way] != eager}
    best = led[0].double().topk(2).values
    return {
        "part": pair.part, "topic": pair.topic, "question": pair.question, "document_tokens": len(document),
        "question_tokens": len(question), "steps": STEPS, "tokens": tokens,
        "equal": {way: sum(a == b for a, b in zip(tokens[way], eager, strict=True)) for way in ways},
        "parted": {
            way: one | {"spacing": spacing(float(logits[0, one["step"], eager[one["step"]]]))}
            for way, one in parted.items()
        },
        "led": {way: int((led[i].argmax(-1) == led[0].argmax(-1)).sum()) for i, way in enumerate(ways)},
        "gaps": (best[:, 0] - best[:, 1]).tolist(), "outputs": compared["outputs"], "same": compared["same"],
        "distances": {way: one.tolist() for way, one in compared["distances"].items()},
    }  # fmt: skip


def attentions(prefix_len: int) -> dict[str, Attend]:
    """Return what each way attends with; eager is the first, and the last once more."""

    def nudged(generator: torch.Generator) -> Attend:
        return lambda *qkv: nudge(eager_attention(*qkv), generator)

    return {
        "eager": eager_attention,
        **{name: partial(twin, prefix_len=prefix_len, rounding=rounding) for name, rounding in TWINS.items()},
        RESUMMED: resummed, "sdpa": stock_sdpa, "sdpa-whole": stock_sdpa,
        **{f"nudged-{seed}": nudged(torch.Generator().manual_seed(seed)) for seed in range(NUDGES)},
        "eager-again": eager_attention,
    }  # fmt: skip


@contextmanager
def attending(model: PreTrainedModel, ways: dict[str, Attend], *, compare: bool) -> Iterator[dict[str, Any]]:
    """Let each row of a batch attend in its way; compare the ways on eager's q, K and V with eager's bits and fp64."""
    found: dict[str, Any] = {
        "outputs": 0, "same": dict.fromkeys(COMPARED, 0),
        "distances": {way: torch.zeros(len(BINS), dtype=torch.int64) for way in COMPARED},
    }  # fmt: skip

    def attend(
        module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, **options: object
    ) -> tuple[torch.Tensor, None]:
        assert options["scaling"] == q.shape[3] ** -0.5
        rows = list(zip(q.split(1), k.split(1), v.split(1), strict=True))
        outs = [compute(*qkv) for compute, qkv in zip(ways.values(), rows, strict=True)]
        if compare:
            oracle = reference(*rows[0])
            found["outputs"] += outs[0].numel()
            for way in COMPARED:
                out = ways[way](*rows[0])
                found["same"][way] += int((out == outs[0]).sum())
                found["distances"][way] += histogram(out, oracle)
        return torch.cat(outs), None

    AttentionInterface.register(BY_ROW, attend)
    AttentionMaskInterface.register(BY_ROW, eager_mask)
    model.set_attn_implementation(BY_ROW)
    yield found
    model.set_attn_implementation("eager")


def spacing(logit: float) -> float:
    """Return how far apart bf16 numbers are at a logit."""
    return 2.0 ** (torch.tensor(logit).frexp().exponent.item() - 8)


def about() -> dict[str, Any]:
    """Say what decides the figures."""
    return machine() | {
        "fast": "a torch twin of the kernel's arithmetic: tiles, leaves, folds and roundings are the kernel's, "
        "sums within a product torch's in fp32",
        "nudge_every": NUDGE_EVERY, "question": QUESTION,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
