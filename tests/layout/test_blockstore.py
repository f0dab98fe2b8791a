"""Store: what was published comes back bit for bit, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout import BlockStore, Manifest, unpack

Make = Callable[..., Any]


def blocks_of(store: BlockStore) -> list[Path]:
    """List the block files."""
    return sorted(store.root.glob("blocks/*/*.safetensors"))


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_store__every_bit_comes_back(store: BlockStore, make: Make, same_bits: Callable[..., bool], n: int) -> None:
    sample, seen = make(n), []
    done = store.put(sample.spec, sample.ids.view(1, -1), sample.k, sample.v, progress=lambda *p: seen.append(p))
    document = store.get(done.digest, progress=lambda *p: seen.append(p))
    assert torch.equal(document.token_ids(), sample.ids)
    assert document.manifest.spec == sample.spec
    k, v = (torch.cat([getattr(s, name) for s in document.shards]) for name in ("k", "v"))
    assert all(map(same_bits, unpack(k, v, n), (sample.k, sample.v)))
    assert (done.tokens, done.blocks_new, done.blocks_reused) == (n, -(-n // 256), 0)
    assert done.payload_bytes == document.manifest.payload_bytes
    assert seen[-1] == (done.payload_bytes, done.payload_bytes) and len(seen) >= 2 * -(-n // 256)
    assert all(total == done.payload_bytes for _, total in seen)


def test_store__a_shared_beginning_is_stored_once(store: BlockStore, make: Make) -> None:
    sample = make(600)
    first = sample.start(520).put(store)
    second = sample.put(store)
    assert (first.blocks_new, second.blocks_new, second.blocks_reused) == (3, 1, 2)
    assert len(blocks_of(store)) == 4
    stamps = [path.stat().st_mtime_ns for path in blocks_of(store)]
    third = sample.put(store)
    assert (third.digest, third.blocks_new, third.blocks_reused) == (second.digest, 0, 3)
    assert [path.stat().st_mtime_ns for path in blocks_of(store)] == stamps


def test_store__salt_and_producer_never_share_a_document(store: BlockStore, make: Make) -> None:
    changes = ({}, {"salt": "a"}, {"salt": "b"}, {"producer": "contract"})
    assert len({make(300, **change).put(store).digest for change in changes}) == 4
    assert len(store.ls()) == 4 and len(blocks_of(store)) == 8


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_store__half_written_document_is_never_visible(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    sample, rename, calls = make(700), os.replace, []

    def crash(source: str, target: str, **folders: int) -> None:
        calls.append(target)
        if len(calls) > renames:
            raise OSError("power cut")
        rename(source, target, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            sample.put(store)
    assert store.ls() == [] and store.find(sample.spec.digest, sample.ids) == []
    assert [p for p in store.root.rglob("*") if p.name.startswith(".tmp-")] == []
    assert sample.put(store).blocks_reused == renames
    assert store.verify().ok


def test_store__left_over_temporary_files_are_no_documents(store: BlockStore, make: Make) -> None:
    done = make(300).put(store)
    (store.root / "manifests" / ".tmp-1-dead.json").write_bytes(b"{")
    (store.root / "manifests" / ".tmp-1-dead").write_bytes(b"{")
    assert [line.digest for line in store.ls()] == [done.digest]
    assert store.verify().ok


def test_store__failing_index_does_not_unpublish(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, rename = make(300), os.replace

    def crash(source: str, target: str, *, dst_dir_fd: int, **folders: int) -> None:
        if os.readlink(f"/proc/self/fd/{dst_dir_fd}") == f"{store.root}/index":
            raise OSError("disk full")
        rename(source, target, dst_dir_fd=dst_dir_fd, **folders)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.warns(UserWarning, match="could not be written"):
        done = sample.put(store)
    assert torch.equal(store.get(done.digest).token_ids(), sample.ids)


@pytest.mark.parametrize("verify", ["auto", "sha256"])
def test_store__damaged_block_is_named_and_publishing_again_heals(store: BlockStore, make: Make, verify: str) -> None:
    sample = make(600)
    done = sample.put(store)
    store.get(done.digest)
    path = blocks_of(store)[1]
    flip(path, 9000)
    with pytest.raises(IntegrityError, match=path.name):
        store.get(done.digest, verify=verify)
    defects = store.verify().defects
    assert [d.path for d in defects] == [path] and defects[0].digest == done.digest
    again = sample.put(store)
    assert (again.blocks_new, again.blocks_reused) == (1, 2)
    assert store.verify(done.digest[:8]).ok and store.get(done.digest, verify=verify)


def test_store__missing_block_is_named(store: BlockStore, make: Make) -> None:
    done = make(300).put(store)
    path = blocks_of(store)[0]
    path.unlink()
    with pytest.raises(IntegrityError, match=path.name):
        store.get(done.digest)
    assert "missing" in store.verify().defects[0].problem


def test_verify__collects_every_defect(store: BlockStore, make: Make) -> None:
    digests = [make(300, seed=seed).put(store).digest for seed in range(3)]
    flip(store.manifest_path(digests[0]), 20)
    for block_id in store.manifest(digests[1]).blocks:
        flip(store.block_path(block_id), -1)
    report = store.verify()
    assert not report.ok and (report.documents, report.blocks) == (2, 4)
    assert sorted(d.digest for d in report.defects) == sorted([digests[0]] + [digests[1]] * 2)
    assert store.verify(digests[2]).ok
    with pytest.warns(UserWarning, match=digests[0]):
        assert len(store.ls()) == 2


def test_store__tampered_manifest_is_refused(store: BlockStore, make: Make) -> None:
    done = make(300).put(store)
    flip(store.manifest_path(done.digest), 100)
    with pytest.raises(IntegrityError, match=done.digest):
        store.get(done.digest)


@pytest.mark.parametrize("swap", ["files", "manifest order", "longer block"])
def test_store__valid_blocks_in_the_wrong_place_are_refused(store: BlockStore, make: Make, swap: str) -> None:
    sample = make(600)
    manifest = store.get(sample.put(store).digest).manifest
    a, b, c = manifest.blocks
    if swap == "files":
        path_a, path_b = store.block_path(a), store.block_path(b)
        data = path_a.read_bytes()
        path_a.write_bytes(path_b.read_bytes())
        path_b.write_bytes(data)
    else:
        blocks, n = ((b, a, c), 600) if swap == "manifest order" else ((a, b, c), 599)
        manifest = Manifest(manifest.spec, n, blocks)
        store.manifest_path(manifest.digest).write_bytes(manifest.to_bytes())
    with pytest.raises(IntegrityError):
        store.get(manifest.digest)
    assert not store.verify(manifest.digest).ok


def test_store__unknown_format_is_left_alone(tmp_path: Path) -> None:
    BlockStore(tmp_path / "s")
    assert (tmp_path / "s" / "format").read_text() == "kvkern-store-v1"
    (tmp_path / "s" / "format").write_text("kvkern-store-v2")
    with pytest.raises(LayoutError, match="kvkern-store-v2"):
        BlockStore(tmp_path / "s")
    (tmp_path / "home" / "photos").mkdir(parents=True)
    with pytest.raises(LayoutError, match="not a kvkern store"):
        BlockStore(tmp_path / "home")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["photos"]


def test_resolve__short_names(store: BlockStore, make: Make) -> None:
    with pytest.raises(LayoutError, match="the store is empty"):
        store.get("0" * 64)
    digest = make(10).put(store).digest
    assert store.resolve(digest[:8]) == digest == store.resolve(digest)
    assert store.get(digest[:12]).manifest.digest == digest
    wrong = digest[:20] + ("0" if digest[20] != "0" else "1")
    with pytest.raises(LayoutError, match=f"nearby are {digest}"):
        store.resolve(wrong)
    for bad in ("abc", digest.upper() + "X", "../../../x", "", None):
        with pytest.raises(LayoutError, match="8 to 64 lower-case hex"):
            store.resolve(bad)
    twin = digest[:10] + "f" * 54
    store.manifest_path(twin).write_bytes(b"{}")
    with pytest.raises(LayoutError, match="ambiguous"):
        store.resolve(digest[:8])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["k", "v"])
def test_put__nan_and_infinity_are_never_published(store: BlockStore, make: Make, name: str, value: float) -> None:
    sample = make(300)
    getattr(sample, name)[1, 2, 299, 63] = value
    with pytest.raises(LayoutError, match=rf"^{name} holds NaN .*\[1, 2, 299, 63\]"):
        sample.put(store)
    assert store.ls() == [] and blocks_of(store) == []


def test_put__largest_and_subnormal_values_are_published(
    store: BlockStore, make: Make, same_bits: Callable[..., bool]
) -> None:
    sample = make(64)
    sample.k.view(torch.int16)[0, 0, 0, :5] = torch.tensor([0x7F7F, -129, 1, -32768, -32767])
    shard = store.get(sample.put(store).digest).shards[0]
    assert same_bits(shard.k[0].transpose(2, 3), sample.k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, k=s.k.float()), "^k must be a torch.bfloat16"),
        (lambda s: replace(s, v=s.v.half()), "^v must be a torch.bfloat16"),
        (lambda s: replace(s, k=None), "^k must be"),
        (lambda s: replace(s, k=s.k[:, :, :-1]), "^k has shape"),
        (lambda s: replace(s, v=s.v[:1]), "^v has shape"),
        (lambda s: replace(s, v=s.v[None]), "^v must have 4"),
        (lambda s: replace(s, ids=s.ids[:-1]), "^k has shape"),
        (lambda s: replace(s, ids=s.ids[:0]), "^token_ids"),
        (lambda s: replace(s, ids=-s.ids - 1), "^token_ids"),
        (lambda s: replace(s, spec=replace(s.spec, num_layers=3)), "spec and token_ids require"),
    ],
)
def test_raises_put__form(store: BlockStore, make: Make, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        change(make(70)).put(store)
    assert blocks_of(store) == []


def test_store__two_writers_of_one_document_both_succeed(store: BlockStore, make: Make) -> None:
    sample = make(700)
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(sample.put, BlockStore(store.root)) for _ in range(8)]
        digests = {job.result().digest for job in work}
    assert len(digests) == 1 and len(blocks_of(store)) == 3 and store.verify().ok


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = sys.modules["triton"] = None
import torch
from kvkern.layout import BlockStore
from kvkern.spec import KVSpec
store = BlockStore(sys.argv[1])
spec = KVSpec("a" * 64, "X", 1, 2, 1, 64, {})
k = (torch.arange(300 * 64) % 251).bfloat16().view(1, 1, 300, 64)
done = store.put(spec, list(range(300)), k, k)
assert store.verify().ok and store.ls()[0].digest == done.digest
assert store.find(spec.digest, list(range(290))) == [(done.digest, 290)]
assert store.gc().blocks_needed == 2 and store.why(range(9))[0].matched == 9
print(done.digest, done.blocks_new)
"""


def test_store__needs_no_transformers_and_survives_a_restart(store: BlockStore, run_python: Callable[..., str]) -> None:
    first = run_python(WITHOUT_TRANSFORMERS, store.root, hash_seed="1").split()
    second = run_python(WITHOUT_TRANSFORMERS, store.root, hash_seed="2").split()
    assert first[0] == second[0] and (first[1], second[1]) == ("2", "0")
    document = store.get(first[0])
    assert document.token_ids().tolist() == list(range(300))


def test_store__files_are_where_the_format_says(store: BlockStore, make: Make) -> None:
    done = make(300).put(store)
    files = sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())
    ids = json.loads((store.root / "manifests" / f"{done.digest}.json").read_bytes())["blocks"]
    blocks = [f"blocks/{i[:2]}/{i}.safetensors" for i in ids]
    rest = ["format", f"index/{done.digest}.json", "lock", f"manifests/{done.digest}.json"]
    assert files == sorted(blocks + rest)
    for block_id, name in zip(ids, blocks, strict=True):
        assert hashlib.sha256((store.root / name).read_bytes()).hexdigest() == block_id
    assert str(store.root) not in (store.root / rest[3]).read_text()


ELSEWHERE = """
import os, sys, warnings
warnings.simplefilter("error")
from kvkern.layout import BlockStore
os.chdir(sys.argv[1])
store = BlockStore("moved")
for line in store.ls():
    document = store.get(line.digest)
    ids = document.token_ids()
    print(line.digest, len(document.shards), *store.find(line.spec.digest, ids)[0])
"""


def test_store__moved_and_read_elsewhere_everything_is_found(
    store: BlockStore, make: Make, run_python: Callable[..., str], tmp_path: Path
) -> None:
    """Another process, hash seed, working directory and place; the index is trusted again, not rebuilt."""
    samples = [make(300), make(700), make(520, seed=1)]
    done = [sample.put(store) for sample in samples]
    store.root.rename(tmp_path / "moved")
    lines = run_python(ELSEWHERE, tmp_path, hash_seed="12345").splitlines()
    expected = {f"{d.digest} {d.blocks_new + d.blocks_reused} {d.digest} {d.tokens}" for d in done}
    assert set(lines) == expected


PINNED = "e8f7792f7a31240c26a2a9de3d32e8880cc8e56fead061c24f7fb549330d3c08"


@pytest.mark.parametrize("threads", [1, 2])
def test_put__digest_depends_on_spec_tokens_and_kv_alone(tmp_path: Path, make: Make, threads: int) -> None:
    """In an empty store, in a full one, again, on other threads, and on the machine where it was pinned."""
    sample, before = make(2000), torch.get_num_threads()
    k = (torch.arange(sample.k.numel()) % 251 - 125).bfloat16().view_as(sample.k)
    sample = replace(sample, ids=torch.arange(2000) * 7 % 1000, k=k, v=-k)
    torch.set_num_threads(threads)
    try:
        full, empty = BlockStore(tmp_path / "full"), BlockStore(tmp_path / "empty")
        for n in (1, 256, 700):
            sample.start(n).put(full)
        digests = {sample.put(store).digest for store in (empty, full, full)}
    finally:
        torch.set_num_threads(before)
    assert digests == {PINNED}


def test_store__damaged_marker_is_rebuilt_and_another_version_refused(store: BlockStore, make: Make) -> None:
    digest = make(300).put(store).digest
    marker = store.root / "format"
    for damage in (b"", b"kvkern-st\x00re-v1", b"\xff" * 40):
        marker.write_bytes(damage)
        with pytest.warns(UserWarning, match="format: damaged"):
            assert BlockStore(store.root).get(digest)
        assert marker.read_bytes() == b"kvkern-store-v1"
    marker.write_bytes(b"kvkern-store-v2")
    with pytest.raises(LayoutError, match="'kvkern-store-v2', this kvkern reads 'kvkern-store-v1'"):
        BlockStore(store.root)


def test_open__a_thousand_documents_keep_no_file_open(store: BlockStore, make: Make) -> None:
    sample = make(10)
    digests = []
    for i in range(1000):
        ids = sample.ids.clone()
        ids[0] = i
        digests.append(store.put(sample.spec, ids, sample.k, sample.v).digest)
    before = len(os.listdir("/proc/self/fd"))
    documents = [store.get(digest) for digest in digests]
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the lease
    assert len({int(document.token_ids()[0]) for document in documents}) == 1000
