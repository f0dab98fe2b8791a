"""A real document under a real small model, published once for the benchmarks that only read it."""

from __future__ import annotations

import atexit
import functools
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import DynamicCache

import kvkern
from tests.support.models import Subject, smollm2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern import Prefix, Store

QUESTION_TOKENS = 16
SCOPES = {"kvkern": "attention", "kvkern-model": "model"}


@functools.cache
def published(tokens: int) -> tuple[Subject, Store, str]:
    """Publish `tokens` of the document with SmolLM2, patched, in a store that lives as long as this process.

    Returns:
        The subject, the store and the document's digest.
    """
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    subject, store = smollm2(), kvkern.Store(folder.name)
    with attending(subject.model, "kvkern"):
        done = store.publish(subject.model, subject.doc(tokens))
    return subject, store, done.digest


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let the model attend with one implementation for a while."""
    before = model.config._attn_implementation
    assert before != "kvkern_contract", "a model under the contract is left by whoever entered it"
    attend_with(model, implementation)
    try:
        yield
    finally:
        attend_with(model, before)


def attend_with(model: PreTrainedModel, implementation: str) -> None:
    """Select an attention implementation, registered or kvkern's; `kvkern-model` is the whole model ours."""
    if implementation in SCOPES:
        kvkern.patch(model, scope=SCOPES[implementation])
        return
    kvkern.unpatch(model)
    model.set_attn_implementation(implementation)


def dense_kv(prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Return a published document's K and V as stock has them, `[layers, kv_heads, n, head_dim]`."""
    return prefix.document.kv()


def stock_cache(prefix: Prefix) -> DynamicCache:
    """Return a DynamicCache with the bits that stock eager's prefill leaves in it."""
    cache = DynamicCache(config=prefix.model.config)
    for layer, (k, v) in enumerate(zip(*dense_kv(prefix), strict=True)):
        cache.update(k[None], v[None], layer)
    return cache
