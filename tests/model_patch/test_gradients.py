"""A gradient that would flow through kvkern is refused by name: none is lost."""

from __future__ import annotations

import pytest
import torch

import kvkern
from kvkern import UnsupportedError
from tests.model_patch.conftest import tiny
from tests.support.bits import differing


@pytest.mark.parametrize("scope", ["attention", "model"])
def test_raises_backward__in_eval_mode(scope: str, doc: list[int], trusted_tables) -> None:
    model = tiny("qwen3")
    kvkern.patch(model, scope=scope)
    logits = model(torch.tensor([doc])).logits
    with torch.no_grad():
        assert differing(model(torch.tensor([doc])).logits, logits.detach()) == 0
    with pytest.raises(UnsupportedError, match=r"a gradient would flow through kvkern's .*kvkern\.unpatch\(model\)"):
        logits.float().sum().backward()


@pytest.mark.parametrize("scope", ["attention", "model"])
def test_raises_forward__in_training_mode(scope: str, doc: list[int], trusted_tables) -> None:
    model = tiny("qwen3")
    kvkern.patch(model, scope=scope)
    with pytest.raises(UnsupportedError, match="gradient"):
        model.train()(torch.tensor([doc]))


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("attached", [False, True])
def test_raises_backward__one_projection_is_trained(trained: str, attached: bool, store: kvkern.Store, doc) -> None:
    """The keys of an attached reader reach attention beside autograd."""
    model = tiny("qwen3").requires_grad_(False)
    getattr(model.model.layers[0].self_attn, trained).weight.requires_grad_(True)
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    inputs = store.open(digest, model).prepare([5, 6]) if attached else {"input_ids": torch.tensor([doc])}
    logits = model(**inputs).logits
    with pytest.raises(UnsupportedError, match="a gradient would flow through kvkern's attention"):
        logits.float().sum().backward()


def test_backward__after_unpatch_is_stocks(doc: list[int]) -> None:
    model, stock = tiny("qwen3"), tiny("qwen3")
    kvkern.patch(model)
    kvkern.unpatch(model)
    for each in (model, stock):
        each.train()(torch.tensor([doc])).logits.float().sum().backward()
    grads = [each.model.layers[0].self_attn.q_proj.weight.grad for each in (model, stock)]
    assert differing(*grads) == 0 and bool(grads[0].any())
