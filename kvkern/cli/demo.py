"""The demo: publish a real document, ask questions about it, and compare every bit with stock."""

from __future__ import annotations

import copy
import hashlib
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvkern.cli.asking import QUESTION, ask, document_ids, question_rows
from kvkern.environment import cpu_isa
from kvkern.errors import LayoutError
from kvkern.kernels import native
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.identity import spec_of
from kvkern.model_patch.load import SMOLLM2, load_model
from kvkern.model_patch.register import patch
from kvkern.model_patch.store import Store
from kvkern.probe import stock_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvkern.cli.asking import Answers
    from kvkern.model_patch.store import Prefix

    Say = Callable[[str], None]

_T = TypeVar("_T")

TOPICS = ("debugger", "with", "raise", "for", "import", "try")
"""Help topics that come with Python (pydoc_data.topics), joined in this order: the demo's document."""

QUESTIONS = (
    "Which module defines the debugger?",
    "Is the debugger extensible?",
    "What is the typical usage to break into the debugger?",
)


@dataclass(frozen=True)
class Comparison:
    """Numbers of kvkern and of stock, compared as 16-bit words.

    Attributes:
        what: what was compared.
        count: numbers compared.
        differ: how many of them differ.
        is_computed: whether both sides computed them, so that the order of stock's sums matters.
    """

    what: str
    count: int
    differ: int
    is_computed: bool


@dataclass(frozen=True)
class Times:
    """Seconds. Prefill and step of stock `eager` are the yardstick."""

    stock_prefill: float
    kvkern_prefill: float
    publish: float
    first_open: float
    later_open: float
    stock_step: float
    kvkern_step: float


@dataclass(frozen=True)
class Demo:
    """Everything that the demo found.

    Attributes:
        host: torch version, CPU ISA and threads, in words.
        follows: whether stock on this host adds in the contract's order.
        reason: how that was found, in words.
        digest: the document's name.
        tokens: its length.
        blocks: blocks it takes in the store.
        payload_bytes: bytes of ids, K and V in the store.
        questions: what was asked.
        answers: what the readers said, as one batch.
        comparisons: bits, stock against kvkern.
        stock_sha256: SHA-256 of all compared logits of stock.
        kvkern_sha256: the same of kvkern.
        steps: greedy steps behind these logits.
        times: seconds.
    """

    host: str
    follows: bool
    reason: str
    digest: str
    tokens: int
    blocks: int
    payload_bytes: int
    questions: tuple[str, ...]
    answers: Answers
    comparisons: tuple[Comparison, ...]
    stock_sha256: str
    kvkern_sha256: str
    steps: int
    times: Times

    @property
    def ok(self) -> bool:
        """Whether all bits that must be equal on this host are equal."""
        return not any(c.differ for c in self.comparisons if self.follows or not c.is_computed)


def run(root: Path, *, tokens: int, max_new_tokens: int, say: Say) -> Demo:
    """Publish a document of Python's own help, open it, ask, and compare with stock `eager`.

    Args:
        root: the store.
        tokens: length of the document.
        max_new_tokens: length of an answer.
        say: called with what is being done.

    Returns:
        What was found.

    Raises:
        LayoutError: the help topics hold fewer tokens, or the model is not installed.
        UnsupportedError: there is no C compiler.
    """
    stock, reader, tokenizer = _models(say)
    ids = _topic_ids(tokenizer, tokens)
    say(f"stock eager reads {tokens:,} tokens")
    cache, stock_prefill_s = _timed(lambda: _read(stock, ids))
    k, v = (torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
    say("publishing, then opening with every byte through SHA-256")
    store = Store(root)
    done, publish_s = _timed(lambda: store.put(spec_of(stock), ids, k, v))
    prefix, first_open_s = _timed(lambda: store.open(done.digest, reader))
    _, later_open_s = _timed(lambda: store.open(done.digest, reader))
    say("asking three questions as one batch")
    answers = ask(prefix, tokenizer, QUESTIONS, max_new_tokens=max_new_tokens)
    say("reading the document again through kvkern's attention")
    kvkern_kv, kvkern_prefill_s = _timed(lambda: prefill(reader, ids))
    rows = question_rows(tokenizer, QUESTIONS, QUESTION)
    logits = _Logits.of(stock, cache, prefix, rows, max_new_tokens, say)
    return Demo(
        host=f"torch {torch.__version__}, CPU with {cpu_isa()}, {torch.get_num_threads()} threads",
        **asdict(stock_order()),
        digest=done.digest,
        tokens=done.tokens,
        blocks=done.blocks_new + done.blocks_reused,
        payload_bytes=done.payload_bytes,
        questions=QUESTIONS,
        answers=answers,
        comparisons=(
            _compare("K and V: read back from the store", prefix.document.kv(), (k, v), is_computed=False),
            _compare("K and V: document read by kvkern's attention", kvkern_kv, (k, v)),
            *logits.comparisons,
        ),
        stock_sha256=logits.sha256[0],
        kvkern_sha256=logits.sha256[1],
        steps=len(rows) * max_new_tokens,
        times=Times(stock_prefill_s, kvkern_prefill_s, publish_s, first_open_s, later_open_s, *logits.step_s),
    )


def _models(say: Say) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the publisher as it comes and the reader patched: two objects, as in two processes."""
    say("compiling the C library, once")
    native.library()
    say("loading SmolLM2-135M-Instruct twice: as it comes, and patched")
    (stock, tokenizer), (reader, _) = load_model(SMOLLM2), load_model(SMOLLM2)
    patch(reader)
    for model in (stock, reader):
        prefill(model, torch.ones(1, 64, dtype=torch.int64))  # the first run of a model pays for its set-up
    return stock, reader, tokenizer


@dataclass(frozen=True)
class _Logits:
    """Logits of greedy decoding, stock first and kvkern second in every pair."""

    comparisons: tuple[Comparison, ...]
    sha256: tuple[str, str]
    step_s: tuple[float, float]

    @classmethod
    def of(
        cls, stock: PreTrainedModel, cache: Any, prefix: Prefix, rows: list[list[int]], steps: int, say: Say
    ) -> _Logits:
        """Decode every question on both sides: document, then the question in one forward, then token by token."""
        comparisons, hashes, seconds = [], (hashlib.sha256(), hashlib.sha256()), ([], [])
        for i, row in enumerate(rows, 1):
            say(f"question {i}: stock eager, then kvkern, {steps} steps each")
            starts = (
                (stock, {"input_ids": torch.tensor([row]), "past_key_values": copy.deepcopy(cache)}),
                (prefix.model, prefix.prepare(row)),
            )
            both = []
            for side, (model, inputs) in enumerate(starts):
                logits, spent = zip(*_greedy(model, inputs, steps), strict=True)
                both.append(torch.cat(logits))
                hashes[side].update(both[side].view(torch.int16).numpy())
                seconds[side].extend(spent[1:] or spent)
            comparisons.append(_compare(f"logits: question {i}, {steps} steps", (both[1],), (both[0],)))
        medians = (statistics.median(seconds[0]), statistics.median(seconds[1]))
        return cls(tuple(comparisons), (hashes[0].hexdigest(), hashes[1].hexdigest()), medians)


def _greedy(model: PreTrainedModel, inputs: dict[str, Any], steps: int) -> Iterator[tuple[Tensor, float]]:
    """Yield the logits `[1, vocabulary]` bf16 of every step, and its seconds; the first step reads the question."""
    cache = inputs["past_key_values"]
    for _ in range(steps):
        start = time.perf_counter()
        with torch.inference_mode():
            logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            inputs = {"input_ids": logits.argmax(-1, keepdim=True), "past_key_values": cache}
        yield logits, time.perf_counter() - start


def _topic_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    from pydoc_data.topics import topics

    ids = document_ids(tokenizer, "\n\n".join(topics[name].strip() for name in TOPICS))
    if not 1 <= tokens <= len(ids):
        raise LayoutError(f"--tokens is {tokens}: Python's help topics {', '.join(TOPICS)} make 1 to {len(ids)}")
    return torch.tensor([ids[:tokens]])


def _read(model: PreTrainedModel, ids: Tensor) -> Any:
    """Prefill as stock does, into the DynamicCache that transformers makes by itself."""
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _compare(what: str, mine: Sequence[Tensor], stock: Sequence[Tensor], *, is_computed: bool = True) -> Comparison:
    """Count the numbers whose 16 bits differ."""
    pairs = [
        (a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)) for a, b in zip(mine, stock, strict=True)
    ]
    differ = sum(int((a != b).sum()) for a, b in pairs)
    return Comparison(what, sum(a.numel() for a, _ in pairs), differ, is_computed)


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
