"""Attach against prefill: what a reader pays to have a document's KV, computed anew or opened from a store."""

from __future__ import annotations

import functools
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

import kvkern
from bench.bits import compared
from bench.documents import QUESTION_TOKENS, attend_with, attending, dense_kv, published
from bench.rotation import REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import PREFIX_TOKENS, SHORT_TOKENS
from kvkern import weights
from kvkern.layout import shard
from kvkern.model_patch import as_configured, calls, eager_form
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.store import difference

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor
    from transformers import PreTrainedModel

pytestmark = REPLAYED
_PREFILLS = ("eager-prefill", "sdpa-prefill", "kvkern-prefill", "kvkern-publish")
_OPENS = ("first-open", "later-open", "recompute-open", "model-checks", "form-check", "next-reader")
_EAGER_ROUNDS = {SHORT_TOKENS: 3, PREFIX_TOKENS: 1}


@pytest.mark.parametrize("variant", (*_PREFILLS, *_OPENS))
@pytest.mark.parametrize("tokens", _EAGER_ROUNDS)
def test_attach_vs_prefill(benchmark: BenchmarkFixture, tokens: int, variant: str) -> None:
    replay(benchmark, attach_vs_prefill(tokens)[variant])


@functools.cache
def attach_vs_prefill(tokens: int) -> dict[str, Cell]:
    """Time stock eager's prefill first, which is the oracle too, then the other prefills, then the opens."""
    group = f"attach-vs-prefill/{tokens}"
    subject, store, digest = published(tokens)
    info = {"shape": f"{subject.name}-P{tokens}"}
    oracle: list[tuple[Tensor, Tensor]] = []

    def eager_prefill(_: int) -> None:
        oracle[:] = [prefill(subject.model, ids)]

    ids = torch.tensor([subject.doc(tokens)])
    with attending(subject.model, "eager"):
        eager = Variant("eager-prefill", eager_prefill, info=info)
        cells = rotate(group, [eager], rounds=_EAGER_ROUNDS[tokens], warmup=0)
        cells["eager-prefill"].info.update(_kv_compared(oracle[0], oracle[0], claim=False))
        prefix = store.open(digest, subject.model)
        kept = _kv_compared(dense_kv(prefix), oracle[0], claim=True)
        cells |= rotate(group, _prefills(subject.model, ids, info, kept, oracle[0]), rounds=3, warmup=0)
        attend_with(subject.model, "kvkern")
        cells |= rotate(group, _opens(prefix, store, subject.question(QUESTION_TOKENS), info | kept), rounds=12)
    return cells


def _prefills(model: PreTrainedModel, ids: Tensor, info: dict, kept: dict, oracle: Any) -> list[Variant]:
    """Return the other ways to compute the KV: stock sdpa, kvkern's attention, and that with publishing."""

    def publish(_: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kvkern.Store(folder).publish(model, ids)

    def compute(_: int) -> None:
        prefill(model, ids)

    with attending(model, "sdpa"):
        of_sdpa = _kv_compared(prefill(model, ids), oracle, claim=False)
    select = {name: functools.partial(attend_with, model, name) for name in ("sdpa", "kvkern")}
    return [
        Variant("sdpa-prefill", compute, select["sdpa"], info | of_sdpa),
        Variant("kvkern-prefill", compute, select["kvkern"], info | kept),
        Variant("kvkern-publish", publish, select["kvkern"], info | kept),
    ]


def _opens(prefix: kvkern.Prefix, store: kvkern.Store, question: list[int], info: dict) -> list[Variant]:
    """Return the ways to attach: in a process that knows nothing yet, in one that does, and to an open prefix."""

    def forget() -> None:
        weights._DIGESTS.clear()
        as_configured._expected_of.cache_clear()
        shard._VERIFIED.clear()

    def attach(_: int) -> None:
        store.open(prefix.digest, prefix.model).prepare(question)

    def recompute(_: int) -> None:
        store.open(prefix.digest, prefix.model, check="recompute").prepare(question)

    def forget_form() -> None:
        eager_form._JUDGED.clear()
        calls._call_site.cache_clear()

    def check_model(_: int) -> None:
        difference(prefix.spec, prefix.model, None, None, contract=False)
        as_configured.require_as_configured(prefix.model)

    info = info | {"document_bytes": prefix.spec.bytes_per_token * prefix.tokens}
    return [
        Variant("first-open", attach, forget, info),
        Variant("later-open", attach, None, info),
        Variant("recompute-open", recompute, None, info),
        Variant("model-checks", check_model, None, info),
        Variant("form-check", lambda _: eager_form.check_form(prefix.model), forget_form, info),
        Variant("next-reader", lambda _: prefix.prepare(question), None, info),
    ]


def _kv_compared(ours: Any, stock: Any, *, claim: bool) -> dict[str, Any]:
    return compared(zip(ours, stock, strict=True), claim=claim)
