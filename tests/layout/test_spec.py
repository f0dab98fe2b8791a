"""Specs and weights: what changes KV changes the digest, and nothing else does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkern import spec as spec_module
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.spec import (
    KVSpec,
    canonical_json,
    model_weights_digest,
    parse_json,
    tagged_sha256,
    weights_digest,
)


def test_spec__survives_json(spec: KVSpec) -> None:
    again = KVSpec.from_json(parse_json(canonical_json(spec.to_json()), "spec"))
    assert again == spec and again.digest == spec.digest and hash(again) == hash(spec)
    assert again.bytes_per_token == 2 * 2 * 3 * 64 * 2
    assert pickle.loads(pickle.dumps(spec)) == spec and copy.deepcopy(spec) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "f" * 64},
        {"architecture": "Other"},
        {"num_layers": 3},
        {"num_q_heads": 3},
        {"head_dim": 128},
        {"config": {}},
        {"config": {"rms_norm_eps": 1, "rope": {}}},
        {"producer": "contract"},
        {"producer_info": {"attention": "sdpa"}},
        {"salt": "tenant"},
    ],
)
def test_spec__any_field_changes_the_digest(spec: KVSpec, change: dict[str, Any]) -> None:
    assert replace(spec, **change).digest != spec.digest
    assert replace(spec, **change) != spec


def test_spec__integer_float_and_bool_differ(spec: KVSpec) -> None:
    assert len({replace(spec, config={"x": x}).digest for x in (1, 1.0, True, "1", None)}) == 5


def test_spec__key_order_does_not_matter(spec: KVSpec) -> None:
    config = dict(reversed(list(spec.config.items())))
    assert replace(spec, config=config).digest == spec.digest


def test_spec__caller_cannot_change_it_afterwards(spec: KVSpec) -> None:
    config: dict[str, Any] = {"rope": {"theta": 1.0}}
    made = replace(spec, config=config)
    config["rope"]["theta"] = 2.0
    assert made.config["rope"]["theta"] == 1.0


def test_spec__digest_is_the_same_in_every_process(spec: KVSpec, run_python: Callable[..., str]) -> None:
    code = """
import json, sys
from kvkern.spec import KVSpec
print(KVSpec.from_json(json.loads(sys.argv[1])).digest)
"""
    text = canonical_json(spec.to_json()).decode()
    digests = {run_python(code, text, hash_seed=seed) for seed in ("0", "4242")}
    assert digests == {spec.digest}


def test_spec__first_difference_is_named(spec: KVSpec) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    other = replace(spec, weights="f" * 64, salt="x", config={**spec.config, "rope": rope})
    assert spec.first_difference(other) == ("config.rope.rope_theta", 10000.0, 1e6)
    assert spec.first_difference(replace(spec, weights="f" * 64))[0] == "weights"
    assert spec.first_difference(replace(spec, salt="x", producer_info={})) is None
    assert spec.first_difference(replace(spec, salt="x"), ignore=()) == ("salt", "", "x")
    assert spec.first_difference(other, ignore=("config", "salt", "weights")) is None
    fewer = replace(spec, config={"rope": dict(spec.config["rope"])})
    assert spec.first_difference(fewer) == ("config.rms_norm_eps", 1e-06, "(absent)")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "ABC"),
        ("weights", None),
        ("architecture", 3),
        ("num_layers", 0),
        ("num_layers", 2.0),
        ("num_layers", True),
        ("num_q_heads", 4),
        ("config", []),
        ("config", {"a.b": 1}),
        ("config", {"a": [1]}),
        ("config", {"a": float("nan")}),
        ("config", {1: 1}),
        ("dtype", "float16"),
        ("producer", "me"),
        ("producer_info", None),
        ("salt", "x" * 257),
    ],
)
def test_raises_spec__field(spec: KVSpec, field: str, value: Any) -> None:
    with pytest.raises(LayoutError, match=field):
        KVSpec.from_json({**spec.to_json(), field: value})


def test_raises_spec__unknown_or_missing_field(spec: KVSpec) -> None:
    with pytest.raises(LayoutError, match="colour"):
        KVSpec.from_json({**spec.to_json(), "colour": 1})
    short = spec.to_json()
    del short["salt"]
    with pytest.raises(LayoutError, match="'salt' is missing"):
        KVSpec.from_json(short)
    with pytest.raises(LayoutError, match="mapping"):
        KVSpec.from_json([1])


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":1}', b'{"a":NaN}', b"[1]", b"\xff", b"{", b"[" * 100000, b'{"a":{"b":1,"b":2}}'],
)
def test_raises_parse_json__hostile(text: bytes) -> None:
    with pytest.raises(LayoutError, match="some.json"):
        parse_json(text, "some.json")


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_hash__fields_never_run_into_each_other(a: list[bytes], b: list[bytes]) -> None:
    assert (tagged_sha256("t", *a) == tagged_sha256("t", *b)) == (a == b)


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
    hash_one = spec_module._sha256_of
    monkeypatch.setattr("kvkern.spec._sha256_of", lambda t: calls.append(1) or hash_one(t))
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

    monkeypatch.setattr("kvkern.spec.weights_digest", counted)
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
