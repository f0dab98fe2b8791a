"""Manifests that repeat a block: refused before they cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvkern.errors import IntegrityError
from kvkern.layout import BlockStore, Manifest, shard
from kvkern.layout.index import chain_keys, encode_index
from kvkern.layout.manifest import MAX_MANIFEST_BYTES

Make = Callable[..., Any]


@pytest.fixture
def repeating(store: BlockStore, make: Make) -> tuple[Manifest, Any]:
    """Return a manifest of 60,000 times one good block, that lies in the store, and the block's document."""
    sample = make(256)
    one = store.manifest(sample.put(store).digest)
    many = replace(one, num_tokens=256 * 60_000, blocks=one.blocks * 60_000)
    assert 1 << 21 < len(many.to_bytes()) <= MAX_MANIFEST_BYTES
    store.manifest_path(many.digest).write_bytes(many.to_bytes())
    return many, sample


def test_store__a_manifest_that_repeats_a_block_is_refused_before_anything_is_mapped(
    store: BlockStore, repeating: tuple[Manifest, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    many, sample = repeating
    mapped: list[int] = []
    real = shard.map_file
    monkeypatch.setattr(shard, "map_file", lambda fd, size: (mapped.append(size), real(fd, size))[1])
    wrong = r"blocks\[1\].*is blocks\[0\] too"
    with pytest.raises(IntegrityError, match=f"{many.digest}.*{wrong}"):
        store.get(many.digest)
    (defect,) = store.verify(many.digest).defects
    assert "is blocks[0] too" in defect.problem and mapped == []
    with pytest.warns(UserWarning, match=wrong):
        document, shared = store.match(sample.spec.digest, sample.ids)
    assert shared == 256 and document.manifest.num_tokens == 256
    with pytest.warns(UserWarning, match=wrong):
        assert [line.digest for line in store.why(sample.ids)] == [document.manifest.digest]
    assert len(mapped) == 1
    index = encode_index(many.digest, chain_keys(sample.spec.digest, sample.ids) * len(many.blocks))
    store.directory.index_path(many.digest).write_bytes(index)  # nothing needs to be mapped where there is one
    with pytest.warns(UserWarning, match=wrong):
        assert store.find(sample.spec.digest, sample.ids) == [(document.manifest.digest, 256)]


def test_gc__a_manifest_that_repeats_a_block_is_listed_and_keeps_it(
    store: BlockStore, repeating: tuple[Manifest, Any]
) -> None:
    many, sample = repeating
    (one,) = {line.digest for line in store.ls()} - {many.digest}
    store.remove(one)
    assert store.gc(grace_s=0).blocks_condemned == 0
    assert hashlib.sha256(store.block_path(many.blocks[0]).read_bytes()).hexdigest() == many.blocks[0]
    store.remove(many.digest)
    assert store.gc(grace_s=0).blocks_condemned == 1
