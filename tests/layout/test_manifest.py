"""Manifests: one spelling per document, and no other bytes pass."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout import Manifest
from kvkern.layout import manifest as manifest_module
from kvkern.spec import KVSpec, canonical_json


def parse(data: bytes) -> Manifest:
    """Read bytes that carry their own digest, as a hostile publisher's do."""
    return Manifest.from_bytes(data, hashlib.sha256(data).hexdigest())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    n=st.integers(1, 2000),
    salt=st.text(max_size=20),
    config=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda key: "." not in key),
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.text(max_size=5)
        | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
)
def test_manifest__survives_its_bytes(spec: KVSpec, n: int, salt: str, config: dict[str, Any]) -> None:
    made = KVSpec.from_json({**spec.to_json(), "salt": salt, "config": config})
    ids = tuple(f"{i:064x}" for i in range(-(-n // 256)))
    manifest = Manifest(made, n, ids)
    again = Manifest.from_bytes(manifest.to_bytes(), manifest.digest)
    assert again == manifest and again.digest == manifest.digest
    assert sum(again.count(i) for i in range(len(ids))) == n


def test_manifest__one_changed_byte_is_refused(spec: KVSpec) -> None:
    manifest = Manifest(spec, 300, ("a" * 64, "b" * 64))
    data = manifest.to_bytes()
    for i in range(0, len(data), 7):
        changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(IntegrityError, match=manifest.digest):
            Manifest.from_bytes(changed, manifest.digest)
        with pytest.raises(IntegrityError):
            Manifest.from_bytes(data[:i], manifest.digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ["a" * 64]}, "300 tokens take 2"),
        ({"blocks": ["a" * 64, "B" * 64]}, r"blocks\[1\]"),
        ({"blocks": ["a" * 64, "../../etc/passwd"]}, r"blocks\[1\]"),
        ({"blocks": ["a" * 64, 5]}, r"blocks\[1\]"),
        ({"blocks": "ab"}, "'blocks' must be a list"),
        ({"num_tokens": 300.0}, "num_tokens"),
        ({"num_tokens": True}, "num_tokens"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 1 << 31}, "num_tokens"),
        ({"format": "kvkern-manifest-v2"}, "format"),
        ({"host": "x"}, "fields are"),
        ({"spec": {}}, "'weights' is missing"),
    ],
)
def test_raises_manifest__field(spec: KVSpec, change: dict[str, Any], message: str) -> None:
    obj = json.loads(Manifest(spec, 300, ("a" * 64, "b" * 64)).to_bytes())
    with pytest.raises(LayoutError, match=message):
        parse(canonical_json({**obj, **change}))


def test_raises_manifest__second_spelling(spec: KVSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Manifest(spec, 1, ("a" * 64,)).to_bytes()
    for other in (data + b"\n", data.replace(b":1,", b": 1,"), data.replace(b"1e-06", b"1e-6")):
        assert other != data
        with pytest.raises(LayoutError, match="canonical"):
            parse(other)
    with pytest.raises(LayoutError, match="duplicate key 'num_tokens'"):
        parse(data.replace(b'"num_tokens":1', b'"num_tokens":2,"num_tokens":1'))
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", len(data) - 1)
    with pytest.raises(LayoutError, match="over the limit"):
        parse(data)
