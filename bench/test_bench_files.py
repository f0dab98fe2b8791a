"""The store alone: publish and load beside plain reads, writes and hashes, and beside other ways to keep a cache."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from bench.bits import compared
from bench.rotation import REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import PREFIX_TOKENS, QWEN3_4B, SMOLLM2, LayerShape
from kvkern.layout import BlockStore, shard, unpack
from kvkern.spec import KVSpec

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor

pytestmark = REPLAYED
LAYERS = {QWEN3_4B: 36, SMOLLM2: 30}
DOCUMENTS = 1000
THREADS = 2
LOADS = ("read-file", "hash", "first-load", "later-load", "safetensors-load", "safetensors-map", "torch-load")
SAVES = ("write-file", "store-put", "store-put-again", "safetensors-save", "torch-save")
OPENS = ("one-first", "one-later", "all-first", "all-later", "find")


@pytest.mark.parametrize("variant", LOADS)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_load(benchmark: BenchmarkFixture, shape: LayerShape, variant: str) -> None:
    replay(benchmark, loads(shape)[variant])


@pytest.mark.parametrize("variant", SAVES)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_save(benchmark: BenchmarkFixture, shape: LayerShape, variant: str) -> None:
    replay(benchmark, saves(shape)[variant])


@pytest.mark.parametrize("variant", OPENS)
def test_open(benchmark: BenchmarkFixture, variant: str) -> None:
    replay(benchmark, opens()[variant])


class Kept:
    """The KV of one document of random numbers, in a store and in the files that others would write."""

    def __init__(self, shape: LayerShape) -> None:
        layers, generator = LAYERS[shape], torch.Generator().manual_seed(0)
        size = (layers, shape.num_kv_heads, PREFIX_TOKENS, shape.head_dim)
        self.k, self.v = (torch.randn(size, generator=generator).bfloat16() for _ in "kv")
        self.ids = torch.arange(PREFIX_TOKENS)
        heads = (layers, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        self.spec = KVSpec("0" * 64, "Random", *heads, config={})
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.store = BlockStore(self.path / "store")
        self.digest = self.store.put(self.spec, self.ids, self.k, self.v).digest
        self.files = [self.store.block_path(block) for block in self.store.manifest(self.digest).blocks]
        self.payload = [path.read_bytes() for path in self.files]
        self.nbytes = sum(map(len, self.payload))

    def tensors(self) -> dict[str, Tensor]:
        """Return a DynamicCache's tensors under names."""
        return {f"{name}.{i}": x for name, all_ in (("k", self.k), ("v", self.v)) for i, x in enumerate(all_)}

    def verified(self) -> dict[str, Any]:
        """Compare every bit of K and V, read back, with what was published."""
        document = self.store.get(self.digest)
        tiles = (torch.cat([getattr(s, name) for s in document.shards]) for name in "kv")
        return compared(zip(unpack(*tiles, PREFIX_TOKENS), (self.k, self.v), strict=True), claim=True)


@functools.cache
def loads(shape: LayerShape) -> dict[str, Cell]:
    """Time what it takes to have a document's bytes: read, verified, or merely mapped."""
    kept = Kept(shape)
    buffer = bytearray(kept.nbytes)
    saved, pickled = kept.path / "cache.safetensors", kept.path / "cache.pt"
    safetensors.torch.save_file(kept.tensors(), saved)
    torch.save(kept.tensors(), pickled)  # noqa: TID251 a peer

    def read(_: int) -> None:
        place = 0
        for path in kept.files:
            with path.open("rb", buffering=0) as file:
                place += file.readinto(memoryview(buffer)[place:])

    def digests(_: int) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda data: hashlib.sha256(data).digest(), kept.payload))

    def dense(_: int) -> dict[str, Tensor]:
        """Load into memory of its own: a map would be read by whoever touches it first."""
        with saved.open("rb") as file:
            return safetensors.torch.load(file.read())

    def forget() -> None:
        shard._VERIFIED.clear()
        shard._FORMS.clear()

    info = {"shape": f"{shape.name}-L{LAYERS[shape]}-P{PREFIX_TOKENS}", "bytes_moved": kept.nbytes}
    checked = info | kept.verified()
    return rotate(
        f"load/{shape}",
        [
            Variant("read-file", read, info=info),
            Variant("hash", digests, info=info),
            Variant("first-load", lambda _: kept.store.get(kept.digest), forget, info=checked),
            Variant("later-load", lambda _: kept.store.get(kept.digest), info=checked),
            Variant("safetensors-load", dense, info=info),
            Variant("safetensors-map", lambda _: safetensors.torch.load_file(saved), info=info),
            Variant("torch-load", lambda _: torch.load(pickled), info=info),  # noqa: TID251 a peer
        ],
        rounds=15,
    )


@functools.cache
def saves(shape: LayerShape) -> dict[str, Cell]:
    """Time what it takes to keep a document's bytes, on the disk when the call returns."""
    kept = Kept(shape)
    fresh = iter(range(1 << 30))

    def path() -> Path:
        return kept.path / f"new-{next(fresh)}"

    def write(_: int) -> None:
        with path().open("wb", buffering=0) as file:
            for data in kept.payload:
                file.write(data)
            os.fsync(file.fileno())

    def synced(save: Any) -> Any:
        def run(_: int) -> None:
            target = path()
            save(target)
            fd = os.open(target, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

        return run

    def clean() -> None:
        for old in kept.path.glob("new-*"):
            old.unlink() if old.is_file() else shutil.rmtree(old)

    info = {"shape": f"{shape.name}-L{LAYERS[shape]}-P{PREFIX_TOKENS}", "bytes_moved": kept.nbytes}
    document = (kept.spec, kept.ids, kept.k, kept.v)
    save_file, save = safetensors.torch.save_file, torch.save  # noqa: TID251 a peer
    return rotate(
        f"save/{shape}",
        [
            Variant("write-file", write, clean, info),
            Variant("store-put", lambda _: BlockStore(path()).put(*document), clean, info),
            Variant("store-put-again", lambda _: kept.store.put(*document), clean, info),
            Variant("safetensors-save", synced(lambda target: save_file(kept.tensors(), target)), clean, info),
            Variant("torch-save", synced(lambda target: save(kept.tensors(), target)), clean, info),
        ],
        rounds=4,
    )


@functools.cache
def opens() -> dict[str, Cell]:
    """Time the opening of one document, of a thousand, and the search among them."""
    folder = tempfile.TemporaryDirectory()
    store = BlockStore(folder.name)
    spec = KVSpec("0" * 64, "Random", 2, 4, 2, 64, config={})
    k = torch.randn(2, 2, 300, 64).bfloat16()
    digests = []
    for i in range(DOCUMENTS):
        ids = torch.arange(300)
        ids[-1] = 1000 + i  # one shared block, and a short one of its own
        digests.append(store.put(spec, ids, k, k).digest)

    def forget() -> None:
        shard._VERIFIED.clear()
        shard._FORMS.clear()

    info = {"shape": "L2-KV2-D64-P300"}
    cells = rotate(
        "open",
        [
            Variant("one-first", lambda i: store.get(digests[i % DOCUMENTS]), forget, {**info, "documents": 1}),
            Variant("one-later", lambda i: store.get(digests[i % DOCUMENTS]), None, {**info, "documents": 1}),
            Variant("all-first", lambda _: list(map(store.get, digests)), forget, {**info, "documents": DOCUMENTS}),
            Variant("all-later", lambda _: list(map(store.get, digests)), None, {**info, "documents": DOCUMENTS}),
            Variant("find", lambda _: store.find(spec.digest, ids), None, {**info, "documents": DOCUMENTS}),
        ],
        rounds=12,
    )
    folder.cleanup()
    return cells
