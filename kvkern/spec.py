"""KVSpec: what must be equal for the KV of two runs to be the same thing, and its digest."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from kvkern.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

PRODUCERS = ("stock", "contract")
ABSENT = "(absent)"
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_DEPTH = 8
_MAX_SALT_CHARS = 256


def is_digest(text: object) -> bool:
    """Tell whether `text` is a SHA-256 as kvkern spells it: 64 lower-case hex digits."""
    return isinstance(text, str) and _HEX64.fullmatch(text) is not None


def canonical_json(obj: Any) -> bytes:
    """Encode `obj` in the only way that kvkern hashes: sorted keys, no spaces, ASCII.

    Raises:
        LayoutError: `obj` holds NaN, infinity or something that JSON has no form for.
    """
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise LayoutError(f"not encodable as canonical JSON: {error}. Use finite scalars.") from None
    return text.encode("ascii")


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Decode one JSON object, refusing what lenient parsers let through.

    Args:
        data: the bytes.
        name: what they are, for the error message.

    Raises:
        LayoutError: no object, a duplicate key, NaN or infinity, bad UTF-8, nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            known: set[str] = set()
            twice = next(key for key, _ in pairs if key in known or known.add(key))
            raise ValueError(f"duplicate key {twice[:80]!r}")
        return seen

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        obj = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{name}: not strict JSON: {error}") from None
    if not isinstance(obj, dict):
        raise LayoutError(f"{name}: a JSON object is required, got {type(obj).__name__}")
    return obj


def tagged_sha256(tag: str, *parts: bytes) -> bytes:
    """Hash a domain tag and some fields, each preceded by its length as u64 LE."""
    digest = hashlib.sha256()
    for part in (tag.encode("ascii"), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, eq=False)
class KVSpec:
    """The identity of a KV cache, without its tokens.

    Two specs are equal when their digests are. Do not change the mappings after construction.

    Attributes:
        weights: SHA-256 of the model's weights, see `kvkern.weights`.
        architecture: the model class, such as `Qwen3ForCausalLM`.
        num_layers: decoder layers.
        num_q_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads.
        head_dim: channels of one head.
        config: everything else that changes KV (norm eps, RoPE fields, activation, ...): JSON
            scalars or nested mappings of them; no key contains a dot.
        dtype: of K and V; only `bfloat16` is published.
        producer: `stock` or `contract`.
        producer_info: how the producer computed (attention implementation, torch version, ISA or
            device).
        salt: keeps documents of different owners apart; at most 256 characters.

    Raises:
        LayoutError: a field is ill-typed or out of range; the message names it.
    """

    weights: str
    architecture: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    config: Mapping[str, Any]
    dtype: str = "bfloat16"
    producer: str = "stock"
    producer_info: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""

    def __post_init__(self) -> None:
        """Check every field and take private copies of the mappings."""
        for name in ("architecture", "dtype", "producer", "salt"):
            if not isinstance(getattr(self, name), str):
                _refuse(name, getattr(self, name), "a string")
        for name in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= 65536:
                _refuse(name, value, "an integer from 1 to 65536")
        if not is_digest(self.weights):
            _refuse("weights", self.weights, "64 lower-case hex digits")
        if self.num_q_heads % self.num_kv_heads:
            _refuse("num_q_heads", self.num_q_heads, f"a multiple of {self.num_kv_heads} KV heads")
        if self.dtype != "bfloat16":
            _refuse("dtype", self.dtype, "'bfloat16', the only published dtype")
        if self.producer not in PRODUCERS:
            _refuse("producer", self.producer, f"one of {PRODUCERS}")
        if len(self.salt) > _MAX_SALT_CHARS:
            _refuse("salt", f"{len(self.salt)} characters", f"at most {_MAX_SALT_CHARS}")
        for name in ("config", "producer_info"):
            object.__setattr__(self, name, _copy_tree(getattr(self, name), name))

    def __eq__(self, other: object) -> bool:
        """Compare by digest, so that 1, 1.0 and True are three different values."""
        return isinstance(other, KVSpec) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash by digest."""
        return hash(self.digest)

    def to_json(self) -> dict[str, Any]:
        """Return every field as a JSON-ready dict."""
        obj = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: _copy_tree(v, n) if isinstance(v, Mapping) else v for n, v in obj.items()}

    @classmethod
    def from_json(cls, obj: Any) -> KVSpec:
        """Build a spec from `to_json` output, accepting nothing else.

        Raises:
            LayoutError: a field is unknown, missing or ill-typed; the message names it.
        """
        if not isinstance(obj, Mapping):
            _refuse("spec", obj, "a mapping")
        names = [f.name for f in fields(cls)]
        for name in obj:
            if name not in names:
                raise LayoutError(f"spec: unknown field {name!r}; known are {', '.join(names)}")
        for name in names:
            if name not in obj:
                raise LayoutError(f"spec: field {name!r} is missing")
        return cls(**obj)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over a domain tag and the canonical JSON, 64 hex digits."""
        return tagged_sha256("kvkern-spec-v1", canonical_json(self.to_json())).hex()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V for one token: 2 tensors x layers x KV heads x head_dim x 2 bytes."""
        return 4 * self.num_layers * self.num_kv_heads * self.head_dim

    def differences(
        self, other: KVSpec, *, ignore: tuple[str, ...] = ("producer", "producer_info", "salt")
    ) -> Iterator[tuple[str, Any, Any]]:
        """Find the fields that differ; `weights`, which explains least, comes last.

        Args:
            other: the spec to compare with.
            ignore: names that may differ, whole subtrees included.

        Yields:
            `(dotted name, mine, theirs)`; "(absent)" where one side lacks the field.
        """
        mine, theirs = _flatten(self.to_json()), _flatten(other.to_json())
        for name in sorted({**mine, **theirs}, key=lambda name: name == "weights"):
            if any(name == skip or name.startswith(f"{skip}.") for skip in ignore):
                continue
            if name not in mine or name not in theirs:
                yield name, mine.get(name, ABSENT), theirs.get(name, ABSENT)
            elif canonical_json(mine[name]) != canonical_json(theirs[name]):
                yield name, mine[name], theirs[name]

    def first_difference(
        self, other: KVSpec, *, ignore: tuple[str, ...] = ("producer", "producer_info", "salt")
    ) -> tuple[str, Any, Any] | None:
        """Return the first of `differences`, or None."""
        return next(self.differences(other, ignore=ignore), None)


def _refuse(name: str, given: Any, allowed: str) -> NoReturn:
    raise LayoutError(f"spec field {name!r}: got {given!r}, allowed is {allowed}")


def _copy_tree(tree: Any, name: str, depth: int = 0) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        _refuse(name, tree, "a mapping")
    if depth == _MAX_DEPTH:
        _refuse(name, "deeper nesting", f"{_MAX_DEPTH} levels of mappings")
    copy: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "." in key:
            _refuse(name, key, "keys that are non-empty strings without a dot")
        dotted = f"{name}.{key}"
        if isinstance(value, Mapping):
            copy[key] = _copy_tree(value, dotted, depth + 1)
        elif value is None or type(value) in (str, bool, int, float):
            if isinstance(value, float) and not math.isfinite(value):
                _refuse(dotted, value, "a finite float")
            copy[key] = value
        else:
            _refuse(dotted, value, "a string, a bool, an int, a float, None or a mapping")
    return copy


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
