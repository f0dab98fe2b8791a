"""Specs: what changes KV changes the digest, and nothing else does."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 a spec must stay picklable; nothing is read from a file
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.errors import LayoutError
from kvkern.spec import KVSpec, canonical_json, parse_json, tagged_sha256


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
