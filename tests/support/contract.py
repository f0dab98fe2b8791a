"""Runs of a model under the contract, each varied in one way, and the digests of what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvkern import operations
from kvkern.model_patch.store import Store
from tests.support.bits import sha256


@dataclass(frozen=True)
class Way:
    """How a model is called: everything that must not matter.

    Attributes:
        chunk: tokens of a forward; all of them when None.
        batch: rows; the others hold other tokens.
        threads: of torch and of C.
        path: the form of Linear to insist on.
        attached: whether the document comes from a store.
        k_major: whether the weights are laid out for decode.
    """

    chunk: int | None = None
    batch: int = 1
    threads: int = 2
    path: str = "auto"
    attached: bool = False
    k_major: bool = True


WAYS = {
    "one shot": Way(), "chunks of 7": Way(chunk=7), "chunks of 256": Way(chunk=256), "batch of 3": Way(batch=3),
    "1 thread": Way(threads=1), "C": Way(path="c"), "stock torch": Way(path="torch"), "attached": Way(attached=True),
    "weights as loaded": Way(k_major=False), "token by token": Way(chunk=1),
}  # fmt: skip


@dataclass(frozen=True)
class Digests:
    """SHA-256 of a document's KV and of the logits of the question behind it."""

    kv: str
    logits: str


def digests(model: PreTrainedModel, document: list[int], question: list[int], way: Way, store: Store) -> Digests:
    """Read a document and a question in the given way, with the model as it is patched now."""
    with _threads(way.threads), _path(way.path), torch.inference_mode():
        if way.attached:
            return _attached(model, document, question, store)
        ids = torch.tensor([document + question])
        rows = [ids] + [ids.roll(7 * i, dims=1) for i in range(1, way.batch)]
        cache, logits = DynamicCache(config=model.config), []
        for chunk in torch.cat(rows).split(way.chunk or ids.shape[1], dim=1):
            logits.append(model(input_ids=chunk, past_key_values=cache).logits[:1])
        kv = [getattr(layer, name)[:1, :, : len(document)] for name in ("keys", "values") for layer in cache.layers]
        return Digests(sha256(torch.stack(kv)), sha256(torch.cat(logits, dim=1)[:, -len(question) :]))


def _attached(model: PreTrainedModel, document: list[int], question: list[int], store: Store) -> Digests:
    done = store.publish(model, document, producer="contract")
    with store.open(done.digest, model) as prefix:
        shards = prefix.document.shards
        k = torch.cat([s.k for s in shards]).permute(1, 2, 0, 4, 3).flatten(2, 3)[:, None, :, : len(document)]
        v = torch.cat([s.v for s in shards]).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, : len(document)]
        logits = model(**prefix.prepare(question)).logits
    return Digests(sha256(torch.cat([k, v])), sha256(logits))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _path(path: str) -> Iterator[None]:
    resolve = operations.resolve_linear
    with pytest.MonkeyPatch.context() as patch:
        if path != "auto":
            patch.setattr(operations, "resolve_linear", lambda rows, weight, **_: resolve(rows, weight, path=path))
        yield
