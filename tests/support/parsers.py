"""Every parser of a store's files, with a valid input, for fuzzing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kvkern.layout import Manifest, encode_shard, pack
from kvkern.layout.header import parse_header
from kvkern.layout.index import chain_keys, decode_index, encode_index
from kvkern.layout.leases import held_in
from kvkern.spec import KVSpec, canonical_json, parse_json

SPEC = KVSpec("5" * 64, "TinyForCausalLM", 1, 2, 1, 64, config={"rope": {"theta": 1e4, "type": "default"}})
TOKENS = torch.arange(70)
NAME = Path("store/file")


def _shard() -> bytes:
    k = torch.ones(1, 1, 70, 64).bfloat16()
    return encode_shard(SPEC, 0, TOKENS, *pack(k, k))


def _manifest() -> bytes:
    return Manifest(SPEC, 300, ("a" * 64, "b" * 64)).to_bytes()


def parse_shard(data: bytes) -> None:
    """Read a header, in place, as a mapped file's."""
    if len(data) >= 4096:  # a shorter file is refused before
        parse_header(np.frombuffer(data, np.uint8), NAME, SPEC)


def parse_manifest(data: bytes) -> None:
    """Read a manifest that carries its own digest, as a hostile publisher's does."""
    assert Manifest.from_bytes(data, hashlib.sha256(data).hexdigest()).to_bytes() == data


def parse_spec(data: bytes) -> None:
    """Read a spec from any JSON."""
    spec = KVSpec.from_json(parse_json(data, "spec"))
    assert KVSpec.from_json(spec.to_json()) == spec


def parse_index(data: bytes) -> None:
    """Read an index file."""
    decode_index(data, "a" * 64, 1)


def parse_lease(data: bytes) -> None:
    """Read a lease."""
    held_in(data, NAME)


PARSERS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "shard": (parse_shard, _shard()),
    "manifest": (parse_manifest, _manifest()),
    "spec": (parse_spec, canonical_json(SPEC.to_json())),
    "index": (parse_index, encode_index("a" * 64, chain_keys(SPEC.digest, TOKENS))),
    "lease": (parse_lease, b"".join(b"%c%064x\n" % (sign, i) for i, sign in enumerate(b"++-+"))),
}
