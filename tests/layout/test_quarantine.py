"""Quarantine and healing: only what is proven wrong moves, nothing is deleted, and publishing again mends the store."""

from __future__ import annotations

import errno
import gc as python_gc
import os
import pickle  # noqa: TID251 errors travel, files do not
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import AccessError, IntegrityError, LayoutError, SpecMismatchError
from kvkern.layout import BlockStore
from kvkern.layout.files import DamagedFile
from tests.support.store_faults import refusing

Make = Callable[..., Any]


def quarantined(store: BlockStore) -> list[bytes]:
    """Return the contents of the quarantine."""
    return [path.read_bytes() for path in sorted(store.root.glob("quarantine/*"))]


def damage(path: Path) -> bytes:
    """Flip a bit; returns what the file holds now."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return bytes(data)


def test_quarantine__a_file_that_was_healed_meanwhile_stays(store: BlockStore, make: Make) -> None:
    digest = make(300).put(store).digest
    path = store.manifest_path(digest)
    said = store.directory.quarantine(
        DamagedFile("read a moment ago, and wrong then", path, digest, 1 << 22), wait=True
    )
    assert "replaced meanwhile" in said and store.get(digest) and quarantined(store) == []


@pytest.mark.parametrize("what", ["block", "manifest"])
def test_put__a_damaged_file_is_set_aside_and_not_deleted(store: BlockStore, make: Make, what: str) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    path = store.manifest_path(digest) if what == "manifest" else store.block_path(store.manifest(digest).blocks[0])
    wrong = damage(path)
    immovable = refusing(("rename",), errno.EACCES, after=0, always=True, under=store.root)
    with immovable, pytest.raises(AccessError, match="quarantine"):
        sample.put(store)
    assert path.read_bytes() == wrong
    assert sample.put(store).digest == digest
    assert quarantined(store) == [wrong] and store.verify().ok and store.gc().documents == 1


def test_put__heals_a_lost_manifest_for_good(store: BlockStore, make: Make) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    damage(store.manifest_path(digest))
    with pytest.raises(IntegrityError):
        store.get(digest)
    assert not store.verify().ok
    sample.put(store)
    assert store.verify().ok
    store.remove(digest)
    assert store.verify().ok and store.gc(grace_s=0).documents == 0  # removed is not lost


def test_put__the_same_document_again_rewrites_nothing(store: BlockStore, make: Make) -> None:
    sample = make(600)
    digest = sample.put(store).digest
    files = [store.manifest_path(digest), *store.root.glob("blocks/*/*")]
    before = [os.lstat(path).st_ino for path in files]
    sample.put(store)
    assert [os.lstat(path).st_ino for path in files] == before


def test_gc__a_rotten_block_is_not_restored(store: BlockStore, make: Make) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    manifest = store.manifest_path(digest).read_bytes()
    store.remove(digest)
    store.gc(grace_s=0)
    wrong = damage(next(iter(sorted(store.root.glob("condemned/*")))))
    store.manifest_path(digest).write_bytes(manifest)
    store.gc(grace_s=0)
    assert quarantined(store) == [wrong]
    with pytest.raises(IntegrityError, match="missing"):
        store.get(digest)
    assert sample.put(store).blocks_new == 1 and store.verify().ok


def test_gc__leaves_other_peoples_files_alone(store: BlockStore, make: Make) -> None:
    store.remove(make(600).put(store).digest)
    store.gc(grace_s=0)
    strange = [store.root / name for name in ("condemned/notes.txt", "leases/readme", "index/notes.json")]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    (store.root / "condemned" / "folder").mkdir()
    (store.root / "leases" / "folder").mkdir()
    store.gc(grace_s=0)
    assert store.gc(grace_s=0).blocks_deleted == 0
    assert all(path.read_bytes() == b"mine" for path in strange)


def test_gc__works_in_no_linked_folder(store: BlockStore, make: Make, tmp_path: Path) -> None:
    make(300).put(store)
    (store.root / "index").rename(tmp_path / "elsewhere")
    (store.root / "index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match="is a link"):
        store.gc(grace_s=0)


def test_lock__is_never_followed_to_another_place(store: BlockStore, make: Make, tmp_path: Path) -> None:
    (store.root / "lock").symlink_to(tmp_path / "made-by-accident")
    with pytest.raises(AccessError, match="lock: .* must not be a link"):
        make(300).put(store)
    assert not (tmp_path / "made-by-accident").exists()


@pytest.mark.filterwarnings("ignore:no lease")
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_verify__what_the_system_fails_to_read_is_no_damage(store: BlockStore, make: Make, code: int) -> None:
    make(300).put(store)
    assert store.verify().ok  # from here on the store has its lease's file
    refused = 0
    for after in range(12):
        with refusing(("open", "read", "pread"), code, after=after, under=store.root) as failed:
            try:
                assert store.verify().ok
            except AccessError as error:
                assert error.errno == code
                refused += 1
        if not failed:
            break
    assert refused >= 3 and store.verify().ok and quarantined(store) == []


def test_find__a_cut_block_is_an_error_and_no_signal(store: BlockStore, make: Make) -> None:
    sample = make(700)
    digest = sample.put(store).digest
    path = store.block_path(store.manifest(digest).blocks[1])
    path.write_bytes(path.read_bytes()[:4200])
    query = sample.ids.clone()
    query[300:] += 1
    with pytest.warns(UserWarning, match="left out"):
        assert store.find(sample.spec.digest, query) == [(digest, 256)]
    with pytest.warns(UserWarning, match="left out"):
        (found,) = store.why(query)
    assert found.matched == 256 and found.differences[0][0] == "file" and str(path) in found.reason


def test_put__a_manifest_over_the_limit_is_refused_before_any_write(store: BlockStore, make: Make) -> None:
    sample = make(300, producer_info={"notes": "x" * (1 << 22)})
    with pytest.raises(LayoutError, match="shorten config or producer_info"):
        sample.put(store)
    assert list(store.root.glob("blocks/*/*")) == []


def test_store__a_relative_path_means_the_same_place_for_ever(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = BlockStore("relative")
    digest = make(300).put(store).digest
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert [line.digest for line in store.ls()] == [digest] and store.get(digest)


@pytest.mark.parametrize(
    "error",
    [
        AccessError("store/file", "open", OSError(errno.EMFILE, "Too many open files")),
        SpecMismatchError("dtype", "bfloat16", "float32"),
        DamagedFile("wrong bytes", Path("store/file"), "0" * 64, 1 << 22),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors__travel_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is type(error) and str(again) == str(error)
    assert {k: str(v) for k, v in vars(again).items()} == {k: str(v) for k, v in vars(error).items()}
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_lease__a_forked_child_reads_and_leaves_its_parents_lease_alone(store: BlockStore, make: Make) -> None:
    digest = make(300).put(store).digest
    document = store.get(digest)
    (lease,) = store.root.glob("leases/*")
    leases = store._leases
    with leases._mutex:  # as if another thread were in there
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child = store.get(digest)
                code = 0 if child.token_ids().numel() == 300 and lease.read_text() == f"+{digest}\n" else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.remove(digest)
    assert store.gc(grace_s=0).removed_but_held == 1
    del document
    python_gc.collect()
    assert store.gc(grace_s=0).removed_but_held == 0


def test_lease__a_finalizer_in_the_middle_loses_nothing(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (make(300, seed=seed).put(store).digest for seed in range(2))
    held = [store.get(a)]
    append, leases = store._leases._append, store._leases

    def collecting(line: str) -> None:
        append(line)
        held.clear()  # the collector runs in the middle of taking the next lease

    monkeypatch.setattr(leases, "_append", collecting)
    document = store.get(b)
    (lease,) = store.root.glob("leases/*")
    assert f"+{b}" in lease.read_text() and dict(leases._held) == {b: 1}
    store.remove(b)
    assert store.gc(grace_s=0).removed_but_held == 1 and document


def test_lease__a_busy_reader_keeps_its_file_small(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvkern.layout import leases

    monkeypatch.setattr(leases, "_COMPACT_BYTES", 2000)
    a, b = (make(300, seed=seed).put(store).digest for seed in range(2))
    document = store.get(a)
    for _ in range(100):
        store.get(b)
    (lease,) = store.root.glob("leases/*")
    assert lease.stat().st_size < 4000 and f"+{a}" in lease.read_text()
    store.remove(a)
    assert store.gc(grace_s=0).removed_but_held == 1 and document


def test_put__is_durable_before_it_is_visible(store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced before it gets its name, every folder after; the manifest comes last."""
    done: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def name_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(store.root))

    def replace(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append(("replace", f"{name_of(dst_dir_fd)}/{target}"))
        real["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("fsync", name_of(fd))), real["fsync"](fd))[1])
    monkeypatch.setattr(os, "replace", replace)
    digest = make(600).put(store).digest
    names = [name for what, name in done if what == "replace"]
    manifest = f"/manifests/{digest}.json"
    assert names.index(manifest) == 3 and names[4] == f"/index/{digest}.json"
    visible = done.index(("replace", manifest))
    for i, (what, name) in enumerate(done):
        if what == "replace":
            assert done[i - 1][0] == "fsync" and ".tmp-" in done[i - 1][1], "named before it was synced"
            folder = ("fsync", str(Path(name).parent))
            assert folder in done[i : None if name == manifest else visible] or name.startswith("/index/")
    assert ("fsync", "/blocks") in done[:visible] and ("fsync", "") in done[:visible]


@pytest.mark.parametrize("bad", [None, "0" * 63, 7])
def test_raises_find__spec_digest(store: BlockStore, bad: object) -> None:
    with pytest.raises(LayoutError, match="spec_digest"):
        store.find(bad, [1, 2])


def test_raises_store__arguments(store: BlockStore, make: Make) -> None:
    sample = make(300)
    for root in (None, "a\0b"):
        with pytest.raises(LayoutError, match="root"):
            BlockStore(root)
    with pytest.raises(LayoutError, match="spec must be a KVSpec"):
        store.put({"weights": "0"}, sample.ids, sample.k, sample.v)
    with pytest.raises(LayoutError, match="spec must be a KVSpec"):
        store.why([1], "spec")
    for grace in ("1", float("nan"), float("inf"), -1):
        with pytest.raises(LayoutError, match="grace_s"):
            store.gc(grace_s=grace)
    with pytest.raises(LayoutError, match="token_ids"):
        store.find("0" * 64, [1.5, 10**400])
    with pytest.raises(LayoutError, match="k must be a dense tensor"):
        store.put(sample.spec, sample.ids, sample.k.to("meta"), sample.v)


def test_put__two_publishers_heal_one_document(store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    damage(store.manifest_path(digest))
    with pytest.raises(IntegrityError):
        store.get(digest)
    names = store.directory.names("quarantine")
    sample.put(store)  # the other one, which was faster
    monkeypatch.setattr(store.directory, "names", lambda folder: names)
    store.directory.mark_healed(digest)
    assert [path.name for path in store.root.glob("quarantine/*")] == [f"{names[0]}.healed"]


def test_lease__compacting_never_waits_for_the_lock(
    store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer may run inside of gc, which holds the lock alone."""
    from kvkern.layout import leases

    monkeypatch.setattr(leases, "_COMPACT_BYTES", 0)
    a, b = (make(300, seed=seed).put(store).digest for seed in range(2))
    document, other = store.get(a), store.get(b)
    with store.directory.lock(exclusive=True):
        del other
    (lease,) = store.root.glob("leases/*")
    assert lease.read_text().endswith(f"-{b}\n") and document
