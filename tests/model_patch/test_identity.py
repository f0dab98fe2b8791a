"""Identity: one document, one digest; and a reader that differs in anything that changes KV is turned away by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvkern
from kvkern import SpecMismatchError
from kvkern.model_patch.identity import IRRELEVANT
from kvkern.model_patch.support import CAUSAL_FIELDS
from tests.model_patch.conftest import tiny

EXPECTED_IN_SPEC = {
    "attention_bias", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "vocab_size",
}  # fmt: skip


def other_values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, config value with one leaf changed)."""
    if isinstance(value, dict):
        for key, leaf in value.items():
            for dotted, changed in other_values(leaf, f"{name}.{key}"):
                yield dotted, {**value, key: changed}
        yield f"{name}.factor", {**value, "factor": 2.0}
    elif isinstance(value, bool):
        yield name, not value
    elif isinstance(value, (int, float)):
        yield name, value * 2 + 1
    elif isinstance(value, str):
        yield name, f"{value}2"


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_raises_open__any_field_of_the_configuration(kind: str, store: kvkern.Store, doc: list[int]) -> None:
    model = tiny(kind)
    digest = store.publish(model, doc).digest
    config, refused = copy.deepcopy(model.config), set()
    for name, value in config.to_dict().items():
        if name in IRRELEVANT | CAUSAL_FIELDS:
            continue
        for dotted, changed in other_values(value, name):
            model.config = copy.deepcopy(config)
            setattr(model.config, name, changed)
            with pytest.raises(SpecMismatchError) as caught:
                store.open(digest, model)
            assert caught.value.field == f"config.{dotted}"
            for side in (caught.value.stored, caught.value.wanted):
                assert repr(side) in str(caught.value)
            refused.add(name)
    assert refused >= EXPECTED_IN_SPEC
    model.config = config
    store.open(digest, model)


@pytest.mark.parametrize("which", range(4))
def test_raises_open__any_weight(which: int, store: kvkern.Store, doc: list[int]) -> None:
    """One bit of one weight, anywhere: embedding, projection, norm, head."""
    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    weights = list(model.state_dict().values())
    weight = weights[(0, len(weights) // 3, len(weights) // 2, -1)[which]]
    weight.view(torch.int16).view(-1)[weight.numel() // 2] ^= 1
    with pytest.raises(SpecMismatchError, match="'weights'") as caught:
        store.open(digest, model)
    assert caught.value.stored in str(caught.value) and caught.value.wanted in str(caught.value)


def test_raises_open__dtype(store: kvkern.Store, doc: list[int]) -> None:
    digest = store.publish(tiny("qwen3"), doc).digest
    with pytest.raises(SpecMismatchError, match="'dtype'.*'bfloat16'.*'float32'"):
        store.open(digest, tiny("qwen3").float())


def test_raises_open__architecture_salt_and_producer(store: kvkern.Store, doc: list[int]) -> None:
    digest = store.publish(tiny("llama"), doc, salt="alice").digest
    for model, arguments, named in (
        (tiny("qwen3"), {"salt": "alice"}, "'architecture'.*'LlamaForCausalLM'.*'Qwen3ForCausalLM'"),
        (tiny("llama"), {"salt": "bob"}, "'salt'.*'alice'.*'bob'"),
        (tiny("llama"), {}, "'salt'.*'alice'.*''"),
        (tiny("llama"), {"salt": "alice", "producer": "contract"}, "'producer'.*'stock'.*'contract'"),
    ):
        with pytest.raises(SpecMismatchError, match=named):
            store.open(digest, model, **arguments)


def test_publish__one_digest_in_an_empty_and_a_full_store_on_one_and_two_threads(tmp_path, doc: list[int]) -> None:
    model, digests = tiny("qwen3"), set()
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            store = kvkern.Store(tmp_path / f"empty-{threads}")
            digests.add(store.publish(model, doc).digest)
            full = kvkern.Store(tmp_path / "full")
            full.publish(model, doc[: 20 * threads])
            digests.add(full.publish(model, doc).digest)
        finally:
            torch.set_num_threads(before)
    assert len(digests) == 1


def test_match__the_longest_beginning_that_this_model_may_read(store: kvkern.Store, doc: list[int]) -> None:
    model, other = tiny("qwen3"), tiny("qwen3", rms_norm_eps=1e-5)
    long, short = store.publish(model, doc).digest, store.publish(model, doc[:30]).digest
    store.publish(other, doc + doc)
    store.publish(model, doc + doc, salt="alice")
    prompt = torch.tensor(doc[:50] + [9, 9, 9])
    prefix = store.match(prompt, model)
    assert (prefix.digest, prefix.tokens) == (long, 50) and prefix.token_ids.tolist() == doc[:50]
    assert store.match(doc, model).tokens == len(doc) - 1  # one token is left to go on with
    assert store.match(doc[:31], model).tokens == 30
    assert store.match(doc * 2, model, salt="alice").tokens == 2 * len(doc) - 1
    assert store.match([9, 9, 9], model) is None and store.match(doc, model, producer="contract") is None
    best, *rest = store.why(prompt, model)
    assert (best.digest, best.matched, best.reason) == (long, 50, f"token_ids[50]: {doc[50]}, 9")
    usable = [line for line in rest if line.is_usable]
    assert [(line.digest, line.matched, line.reason) for line in usable] == [(short, 30, "nothing")]
    refused = {line.differences[0][0] for line in rest if not line.is_usable}
    assert refused == {"config.rms_norm_eps", "salt"}


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_bits_match__a_beginning_reads_like_a_document_of_its_own(store: kvkern.Store, doc: list[int], tokens) -> None:
    model = tiny("qwen3")
    store.publish(model, doc)
    kvkern.patch(model)
    prompt = doc[:tokens] + [60, 61, 62, 63]
    prefix = store.match(prompt, model)
    assert prefix.tokens == tokens
    own = kvkern.Store(store.blocks.root.with_name("own"))
    whole = own.open(own.publish(model, doc[:tokens]).digest, model)
    with torch.no_grad():
        logits = [model(**each.prepare(prompt[tokens:])).logits for each in (prefix, whole)]
    assert torch.equal(*(x.view(torch.int16) for x in logits))
