"""Files that are longer than any of their kind may be, and manifests that repeat a block: refused before they cost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout import BlockStore, Manifest, header, publish, shard
from kvkern.layout.index import chain_keys, encode_index
from kvkern.layout.manifest import MAX_MANIFEST_BYTES

Make = Callable[..., Any]
SPARSE_BYTES = 8 << 40
READ_AT_MOST_BYTES = 64 << 20


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that puts a file without data, 8 TB long, in a place; whoever reads on and on fails."""
    read_bytes = 0

    def counting(real: Callable[..., bytes]) -> Callable[..., bytes]:
        def call(*args: Any) -> bytes:
            nonlocal read_bytes
            part = real(*args)
            read_bytes += len(part)
            assert read_bytes < READ_AT_MOST_BYTES, "a file over the limit is read"
            return part

        return call

    for name in ("read", "pread"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))

    def make_sparse(path: Path, size: int = SPARSE_BYTES) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            try:
                file.truncate(size)
            except OSError as error:
                pytest.skip(f"this file system holds no file of {size} bytes: {error}")
        return path

    yield make_sparse


def quarantined_sizes(store: BlockStore) -> list[int]:
    """Sizes of the files in quarantine."""
    return [path.stat().st_size for path in sorted(store.root.glob("quarantine/*"))]


@pytest.mark.parametrize("what", ["block", "manifest"])
@pytest.mark.parametrize("met_by", ["get", "verify", "put"])
def test_store__a_file_over_the_limit_is_set_aside_unread_and_healed(
    store: BlockStore, make: Make, sparse: Callable[..., Path], what: str, met_by: str
) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    sparse(store.manifest_path(digest) if what == "manifest" else store.block_path(store.manifest(digest).blocks[0]))
    if met_by == "get":
        with pytest.raises(IntegrityError, match=rf"size: {SPARSE_BYTES} .*over the limit.*moved to quarantine"):
            store.get(digest)
    elif met_by == "verify":
        (defect,) = store.verify().defects
        assert f"size: {SPARSE_BYTES}" in defect.problem and "moved to quarantine" in defect.problem
    sample.put(store)
    assert store.verify().ok and quarantined_sizes(store) == [SPARSE_BYTES] and store.gc().documents == 1


def test_table__over_the_limit_is_set_aside_unread_and_healed(store: BlockStore, sparse: Callable[..., Path]) -> None:
    digest = store.put_table(b"cos and sin")
    sparse(store.directory.table_path(digest))
    with pytest.raises(IntegrityError, match=rf"size: {SPARSE_BYTES} .*over the limit.*moved to quarantine"):
        store.table(digest)
    sparse(store.directory.table_path(digest))
    assert store.put_table(b"cos and sin") == digest and store.table(digest) == b"cos and sin"
    assert quarantined_sizes(store) == [SPARSE_BYTES] * 2


def test_gc__does_nothing_while_a_manifest_is_over_the_limit(
    store: BlockStore, make: Make, sparse: Callable[..., Path]
) -> None:
    digest = make(300).put(store).digest
    store.remove(make(600, seed=1).put(store).digest)
    sparse(store.manifest_path(digest))
    with pytest.raises(LayoutError, match=rf"{digest}.*over the limit.*\. Nothing is collected"):
        store.gc(grace_s=0)
    store.remove(digest)
    with pytest.raises(LayoutError, match=rf"removed/{digest}.*Delete it"):
        store.gc()
    assert store.gc(grace_s=0).blocks_condemned == 5  # once it is old it needs not be read


def test_gc__restores_no_block_over_the_limit_and_reads_none(
    store: BlockStore, make: Make, sparse: Callable[..., Path]
) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    manifest = store.manifest_path(digest).read_bytes()
    blocks = store.manifest(digest).blocks
    store.remove(digest)
    store.gc(grace_s=0)
    sparse(store.root / "condemned" / f"{blocks[0]}.safetensors")
    store.manifest_path(digest).write_bytes(manifest)
    store.gc(grace_s=0)
    assert quarantined_sizes(store) == [SPARSE_BYTES]
    assert [store.block_path(block_id).exists() for block_id in blocks] == [False, True]
    assert sample.put(store).blocks_new == 1 and store.verify().ok


def test_get__a_file_longer_than_its_document_says_is_refused_unread_and_left(
    store: BlockStore, make: Make, sparse: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a good block that a wrong manifest names, so only its size refuses it; publishing again heals it."""
    sample = make(300)
    digest = sample.put(store).digest
    path = sparse(store.block_path(store.manifest(digest).blocks[1]), 1 << 32)
    monkeypatch.setattr(shard, "map_file", only_small(shard.map_file))
    with pytest.raises(IntegrityError, match=rf"{path}: size: {1 << 32} bytes"):
        store.get(digest)
    assert len(store.verify().defects) == 1 and path.exists() and quarantined_sizes(store) == []
    sample.put(store)
    assert store.verify().ok and quarantined_sizes(store) == [1 << 32]


def only_small(real: Callable[..., Any]) -> Callable[..., Any]:
    """Let the mapping of a large file fail the test."""

    def call(fd: int, size: int) -> Any:
        assert size < READ_AT_MOST_BYTES, "a file that is too long is mapped"
        return real(fd, size)

    return call


def test_quarantine__a_wrong_manifest_moves_no_good_block(store: BlockStore, make: Make) -> None:
    """A hostile manifest may name another document's block under a spec in which it would be too long."""
    good, small = make(256, num_layers=40), make(256, num_layers=1)
    block = store.manifest(good.put(store).digest).blocks[0]
    wrong = Manifest(small.spec, 256, (block,))
    store.manifest_path(wrong.digest).write_bytes(wrong.to_bytes())
    with pytest.raises(IntegrityError, match=f"{block}.*size"):
        store.get(wrong.digest)
    assert store.block_path(block).exists() and quarantined_sizes(store) == []


def test_put__what_no_reader_could_read_is_not_published(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "MAX_PAYLOAD_BYTES", 1 << 16)
    monkeypatch.setattr(publish, "MAX_TABLE_BYTES", 10)
    with pytest.raises(LayoutError, match="spec makes blocks of .* over the limit of 65536"):
        make(300).put(store)
    with pytest.raises(LayoutError, match="table of 11 bytes, over the limit of 10"):
        store.put_table(b"cos and sin")
    assert list(store.root.glob("*/*")) == []


def test_header__a_payload_over_the_limit_is_refused(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = make(300).put(store).digest
    monkeypatch.setattr(header, "MAX_PAYLOAD_BYTES", 1 << 16)
    monkeypatch.setattr(shard, "_FORMS", {})
    with pytest.raises(LayoutError, match="payload: got .* at most 65536 bytes"):
        store.get(digest)


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
