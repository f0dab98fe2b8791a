"""One decode step of a whole model, end to end, beside the same step without attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench import no_op
from bench.bandwidth import read_variant
from bench.bits import compared
from bench.documents import SCOPES, attend_with, attending, published, stock_cache
from bench.rotation import READ, REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import PREFIX_TOKENS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern import Prefix

pytestmark = REPLAYED
PEERS = ("no-op", "kvkern", "kvkern-model", "eager", "sdpa")
STEP = (READ, *PEERS)
_VERIFIED_STEPS = 4
_ROUNDS = 25


@pytest.mark.parametrize("variant", STEP)
def test_decode_step(benchmark: BenchmarkFixture, variant: str) -> None:
    replay(benchmark, decode_step()[variant])


class Reader:
    """A model with a cache of the document, one token further with every step.

    Args:
        prefix: the document.
        implementation: the attention to run; the cache is the one that goes with it.
    """

    def __init__(self, prefix: Prefix, implementation: str) -> None:
        self.model: PreTrainedModel = prefix.model
        self.prefix, self.implementation = prefix, implementation
        self.cache: Any = None
        self.columns = prefix.tokens
        if implementation == no_op.NO_OP:
            self.cache = no_op.empty_cache(prefix.spec.num_layers, prefix.tokens)
        elif implementation not in SCOPES:
            self.cache = stock_cache(prefix)
        self.inputs: dict[str, Any] = {}

    def prepare(self) -> None:
        """Select the attention and build the inputs, as generate() does between two steps."""
        attend_with(self.model, self.implementation)
        token = self.prefix.token_ids[self.columns % self.prefix.tokens].reshape(1, 1)
        self.columns += 1
        if self.implementation in SCOPES:
            self.inputs = self.prefix.prepare(token, cache=self.cache)
            self.cache = self.inputs["past_key_values"]
            return
        self.inputs = {
            "input_ids": token,
            "attention_mask": torch.ones(1, self.columns, dtype=torch.int64),
            "position_ids": torch.tensor([[self.columns - 1]]),
            "past_key_values": self.cache,
        }

    def step(self, _: int = 0) -> Tensor:
        """Run the model over one token; return its logits."""
        with torch.inference_mode():
            return self.model(**self.inputs, use_cache=True).logits

    def steps(self, count: int) -> Tensor:
        """Prepare and run several steps; return their logits."""
        return torch.cat([(self.prepare(), self.step())[1] for _ in range(count)])


@functools.cache
def decode_step() -> dict[str, Cell]:
    """Time steps from 3,778 keys on; all caches grow alike."""
    no_op.register()
    subject, store, digest = published(PREFIX_TOKENS)
    config = subject.model.config
    weight_bytes = sum(weight.nbytes for weight in subject.model.parameters())
    info = {
        "shape": f"{subject.name}-L{config.num_hidden_layers}-P{PREFIX_TOKENS}+{_VERIFIED_STEPS + 1}",
        "weight_bytes": weight_bytes,
    }
    with store.open(digest, subject.model) as prefix, attending(subject.model, "eager"):
        kv_bytes = prefix.spec.bytes_per_token * prefix.tokens
        readers = {name: Reader(prefix, no_op.NO_OP if name == "no-op" else name) for name in PEERS}
        stock = readers["eager"].steps(_VERIFIED_STEPS)
        variants = [read_variant()]
        for name, reader in readers.items():
            moved = {"bytes_moved": weight_bytes + (0 if name == "no-op" else kv_bytes)}
            own = _compared(reader, name, stock)
            variants.append(Variant(name, reader.step, reader.prepare, info | moved | own))
        return rotate("decode-step", variants, rounds=_ROUNDS, warmup=2)


def _compared(reader: Reader, name: str, stock: Tensor) -> dict[str, Any]:
    """Compare the logits of the first steps with stock eager's, which has taken them already."""
    logits = stock if name == "eager" else reader.steps(_VERIFIED_STEPS)
    return {} if name == "no-op" else compared([(logits, stock)], claim=name == "kvkern")
