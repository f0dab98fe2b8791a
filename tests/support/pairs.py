"""Eight documents with a question each, read by the fast profile, stock sdpa and stock eager: what comes of it."""

from __future__ import annotations

import copy
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import kvkern
from kvkern.contract import TILE_TOKENS
from kvkern.kernels import fast_door
from kvkern.kernels.launch_config import fast_config
from kvkern.model_patch import attention as attention_module
from kvkern.model_patch.store import Prefix
from kvkern.view import KVView
from tests.support.distances import BINS, histogram
from tests.support.models import greedy, greedy_stock, stock_cache
from tests.support.stock import eager_attention

STEPS = 24
WAYS = ("fast", "sdpa", "sdpa-whole")
NUDGED, NUDGE_EVERY = "eager_nudged", 1000


@dataclass(frozen=True)
class Pair:
    """A topic of Python's own help, whole, and what is asked about it.

    Attributes:
        topic: its name in `pydoc_data.topics`.
        tokens: of SmolLM2, in Python 3.11; other versions of Python differ by some.
        question: plain words.
    """

    topic: str
    tokens: int
    question: str

    @property
    def document(self) -> str:
        """The text of the topic."""
        return pydoc_data.topics.topics[self.topic]

    @property
    def asked(self) -> str:
        """What follows the document."""
        return f"\n\nQuestion: {self.question}\nAnswer:"


PAIRS = (
    Pair("power", 319, "What happens when zero is raised to a negative power?"),
    Pair("global", 352, "What does the global statement declare?"),
    Pair("context-managers", 376, "What are context managers typically used for?"),
    Pair("booleans", 394, "Which values are interpreted as false?"),
    Pair("for", 452, "When is the else clause of a for loop executed?"),
    Pair("augassign", 470, "How often is the target of an augmented assignment evaluated?"),
    Pair("exceptions", 489, "When is an exception raised?"),
    Pair("subscriptions", 560, "What does a negative index of a sequence mean?"),
)


@dataclass(frozen=True)
class Reading:
    """What came of one pair.

    Attributes:
        tokens: greedy tokens by way of attending, `eager` among them.
        equal: positions, of all steps, at which each way's token is eager's.
        parted: for each way that leaves eager, its first step, and how much more eager's logits give eager's own token
            there than the one taken instead.
        led: positions at which each way prefers eager's token when it has been given eager's tokens until there.
        gaps: how far eager's best logit lies above its second, at these positions.
        rms: of the difference between each way's logits and eager's, there.
        distances: for each way, outputs of attention by distance from fp64's rounding, see `distances.BINS`.
    """

    tokens: dict[str, list[int]]
    equal: dict[str, int]
    parted: dict[str, dict[str, float]]
    led: dict[str, int]
    gaps: list[float]
    rms: dict[str, float]
    distances: dict[str, list[int]]


def read(model: PreTrainedModel, document: list[int], question: list[int], steps: int = STEPS) -> Reading:
    """Read a document, then a question in one chunk, then go on greedily, in four ways.

    `eager` and `sdpa` go on from the KV that stock eager has made of the document, `fast` from the same KV, published
    and attached; `sdpa-whole` has made the document's KV too. Attention is compared on the q, K and V of every layer
    and call of the fast way. At last each way reads question and eager's tokens in one chunk.
    """
    kvkern.unpatch(model)
    model.set_attn_implementation("eager")
    tokens, led = {}, {}
    with tempfile.TemporaryDirectory() as folder, tiles_of_sm90():
        store = kvkern.Store(folder)
        done = store.publish(model, document, attention="model")
        cache = stock_cache(model, document)
        free, tokens["eager"] = _greedy(model, cache, document, question, steps)
        chunk = question + tokens["eager"][:-1]
        led["eager"] = _lead(model, steps, input_ids=torch.tensor([chunk]), past_key_values=copy.deepcopy(cache))
        model.set_attn_implementation("sdpa")
        _, tokens["sdpa"] = _greedy(model, cache, document, question, steps)
        _, tokens["sdpa-whole"] = _greedy(model, prefilled(model, document), document, question, steps)
        led["sdpa"] = _lead(model, steps, input_ids=torch.tensor([chunk]), past_key_values=cache)
        model.set_attn_implementation("eager")
        kvkern.patch(model, profile="fast")
        with store.open(done.digest, model) as prefix:
            with compared(prefix) as distances:
                tokens["fast"] = greedy(model, steps, **prefix.prepare(question))[1][0].tolist()
            led["fast"] = _lead(model, steps, **prefix.prepare(chunk))
        kvkern.unpatch(model)
    best = led["eager"].topk(2).values
    return Reading(
        tokens,
        {way: sum(a == b for a, b in zip(tokens[way], tokens["eager"], strict=True)) for way in WAYS},
        {way: parting(free, tokens[way], tokens["eager"]) for way in WAYS if tokens[way] != tokens["eager"]},
        {way: int((led[way].argmax(-1) == led["eager"].argmax(-1)).sum()) for way in led},
        (best[:, 0] - best[:, 1]).tolist(),
        {way: float((led[way] - led["eager"]).square().mean().sqrt()) for way in led},
        {way: counts.tolist() for way, counts in distances.items()},
    )


def nudged(
    model: PreTrainedModel, document: list[int], question: list[int], seeds: int, steps: int = STEPS
) -> list[int]:
    """Count, for each seed, the tokens that eager shares with itself when some of attention's outputs are nudged."""
    register_nudged()
    model.set_attn_implementation("eager")
    cache = stock_cache(model, document)
    _, expected = _greedy(model, cache, document, question, steps)
    counts = []
    model.set_attn_implementation(NUDGED)
    for seed in range(seeds):
        torch.manual_seed(seed)
        _, tokens = _greedy(model, cache, document, question, steps)
        counts.append(sum(a == b for a, b in zip(tokens, expected, strict=True)))
    model.set_attn_implementation("eager")
    return counts


def register_nudged() -> None:
    """Register stock eager with one output in `NUDGE_EVERY`, drawn at random, moved to a neighbouring bf16 number."""

    def attend(module: torch.nn.Module, q: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor, None]:
        return nudge(eager_attention_forward(module, q, *rest, **options)[0]), None

    AttentionInterface.register(NUDGED, attend)
    AttentionMaskInterface.register(NUDGED, eager_mask)


def nudge(out: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Move one number in `NUDGE_EVERY`, in place, to a neighbouring one."""
    step = torch.randint(0, 2, out.shape, dtype=torch.int16, generator=generator) * 2 - 1
    out.view(torch.int16).add_(step * (torch.rand(out.shape, generator=generator) < 1 / NUDGE_EVERY))
    return out


def _greedy(
    model: PreTrainedModel, cache: DynamicCache, document: list[int], question: list[int], steps: int
) -> tuple[torch.Tensor, list[int]]:
    logits, tokens = greedy_stock(model, copy.deepcopy(cache), document, [question], steps)
    return logits[0], tokens[0].tolist()


def _lead(model: PreTrainedModel, steps: int, **inputs: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits[0, -steps:].double()


def prefilled(model: PreTrainedModel, document: list[int]) -> DynamicCache:
    """Make the document's KV in the way that the model attends now."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([document]), past_key_values=cache, logits_to_keep=1)
    return cache


def parting(logits: torch.Tensor, tokens: list[int], eager: list[int]) -> dict[str, float]:
    """Return the first step that is not eager's, and how much more eager's logits give eager's own token there."""
    step = next(i for i, (a, b) in enumerate(zip(tokens, eager, strict=True)) if a != b)
    return {"step": step, "margin": float(logits[step, eager[step]] - logits[step, tokens[step]])}


@contextmanager
def tiles_of_sm90() -> Iterator[None]:
    """Let the interpreter compute with tiles of 64 rows, as sm_90 does, and units of 1,024 keys: a call costs less."""
    config = replace(fast_config("interpreter"), block_m=64, units_d64=(1024,), units_d128=(1024,))
    assert config.block_m == fast_config("sm90").block_m
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_door, "config_for", lambda device: config)
        yield


@contextmanager
def compared(prefix: Prefix) -> Iterator[dict[str, torch.Tensor]]:
    """Compare every call of the patch's attention with fp64, and sdpa and eager on the same q, K and V."""
    document = prefix.document.kv()
    counts = {way: torch.zeros(len(BINS), dtype=torch.int64) for way in ("fast", "sdpa", "eager")}
    launch = attention_module.launch

    def launch_and_compare(q: torch.Tensor, kv: KVView, out: torch.Tensor, *rest: object, **options: object) -> None:
        launch(q, kv, out, *rest, **options)
        k, v = dense(kv, *document)
        oracle = reference(q, k, v)
        for way, computed in (("fast", out), ("sdpa", stock_sdpa(q, k, v)), ("eager", eager_attention(q, k, v))):
            counts[way] += histogram(computed, oracle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "launch", launch_and_compare)
        yield counts


def dense(kv: KVView, document_k: torch.Tensor, document_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one reader's keys and values `[1, kv_heads, T, D]`; the document's are `[layers, kv_heads, n, D]`."""
    shared = int(kv.prefix_len) // TILE_TOKENS * TILE_TOKENS
    own = int(kv.prefix_len) - shared + int(kv.suffix_len)
    k, v = kv.suffix_k[0].mT.flatten(1, 2)[:, :own], kv.suffix_v[0].flatten(1, 2)[:, :own]
    parts = (document_k[kv.layer, :, :shared], k), (document_v[kv.layer, :, :shared], v)
    return tuple(torch.cat(part, dim=1)[None] for part in parts)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64, the queries last: `[B, Tq, Hq, D]`."""
    rows, columns = q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    scores = (q.double() @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def stock_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend through transformers' own sdpa function, with the mask that it is given: none for a single query."""
    rows, columns = q.shape[2], k.shape[2]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True, training=False)
    seen = torch.ones(1, 1, rows, columns, dtype=torch.bool).tril(columns - rows)
    return sdpa_attention_forward(module, q, k, v, seen if rows > 1 else None, scaling=q.shape[3] ** -0.5)[0]


def encoded(pair: Pair, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Return the document's and the question's token ids."""
    return encode(pair.document), encode(pair.asked)
