"""Weights: what changes a weight changes the digest, nothing else does, and no change goes unseen."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 a model must stay picklable; nothing is read from a file

import pytest
import torch

from kvkern import weights as weights_module
from kvkern.errors import UnsupportedError
from kvkern.weights import model_weights_digest, weights_digest


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Return weights of several dtypes, a scalar and an empty one among them."""
    return {
        "a": torch.arange(6).bfloat16().view(2, 3),
        "b": torch.tensor(1.5),
        "c": torch.zeros(0),
        "d": torch.tensor([True, False]),
        "e": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
    }


def test_weights__one_bit_name_shape_or_dtype_changes_the_digest(
    tensors: dict[str, torch.Tensor],
) -> None:
    flipped = tensors["a"].clone()
    flipped.view(torch.int16)[1, 2] ^= 1
    variants = [
        tensors,
        {**tensors, "a": flipped},
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"].view(torch.float16)},
        {**tensors, "a": -tensors["a"]},
        {**tensors, "f": torch.zeros(0)},
        {("z" if n == "a" else n): t for n, t in tensors.items()},
        {n: t for n, t in tensors.items() if n != "c"},
    ]
    assert len({weights_digest(variant) for variant in variants}) == len(variants)


def test_weights__order_strides_and_copies_do_not_matter(tensors: dict[str, torch.Tensor]) -> None:
    other = {name: tensors[name].clone().contiguous() for name in reversed(tensors)}
    assert weights_digest(other) == weights_digest(tensors)


def test_weights__tied_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, calls = torch.randn(4, 4), []
    hash_one = weights_module._sha256_of
    monkeypatch.setattr("kvkern.weights._sha256_of", lambda t: calls.append(1) or hash_one(t))
    tied = weights_digest({"embed": weight, "head": weight, "part": weight[:2]})
    assert len(calls) == 2
    assert tied == weights_digest({"embed": weight.clone(), "head": weight.clone(), "part": weight[:2].clone()})


def test_raises_weights__no_bytes() -> None:
    with pytest.raises(UnsupportedError, match="'w'"):
        weights_digest({"w": torch.zeros(2, device="meta")})
    with pytest.raises(UnsupportedError, match="'w'"):
        weights_digest({"w": torch.eye(2).to_sparse()})


def test_weights__model_digest_is_remembered_until_a_weight_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    calls: list[int] = []

    def counted(tensors: dict[str, torch.Tensor]) -> str:
        calls.append(1)
        return weights_digest(tensors)

    monkeypatch.setattr("kvkern.weights.weights_digest", counted)
    first = model_weights_digest(model)
    assert model_weights_digest(model) == first == weights_digest(model.state_dict())
    assert len(calls) == 1

    with torch.no_grad():
        model[0].weight[0, 0] += 1
    second = model_weights_digest(model)
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone() + 1)
    third = model_weights_digest(model)
    model[1].running_mean.add_(1)
    fourth = model_weights_digest(model)
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})
    fifth = model_weights_digest(model)
    model.to(torch.bfloat16)
    sixth = model_weights_digest(model)
    assert len({first, second, third, fourth, fifth, sixth}) == 6
    assert sixth == weights_digest(model.state_dict())
    assert model_weights_digest(copy.deepcopy(model)) == sixth
    assert pickle.loads(pickle.dumps(model)) is not None


def test_weights__parameter_freed_and_remade_at_the_same_address_is_seen() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    seen = set()
    for value in range(8):
        del model.weight
        model.weight = torch.nn.Parameter(torch.full((64, 64), float(value)))
        seen.add(model_weights_digest(model))
    assert len(seen) == 8


def test_weights__inference_tensors_are_never_remembered() -> None:
    with torch.inference_mode():
        model = torch.nn.Linear(4, 4)
        before = model_weights_digest(model)
        model.weight += 1
        assert model_weights_digest(model) != before


def test_raises_weights__extra_state() -> None:
    class Odd(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"x": 1}

    with pytest.raises(UnsupportedError, match="_extra_state"):
        model_weights_digest(Odd(2, 2))
