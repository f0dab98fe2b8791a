"""gc, removal and leases: space comes back, and never at the price of a block that somebody needs."""

from __future__ import annotations

import errno
import fcntl
import gc as python_gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvkern
from kvkern.errors import AccessError, IntegrityError, LayoutError
from kvkern.layout import BlockStore
from tests.support.store_faults import refusing

Make = Callable[..., Any]


def blocks_of(store: BlockStore, folder: str = "blocks/*") -> int:
    """Count the block files in a folder."""
    return len(list(store.root.glob(f"{folder}/*.safetensors")))


def test_gc__takes_back_a_removed_document_in_two_runs(store: BlockStore, make: Make) -> None:
    kept, gone = make(520), make(700, seed=1)
    kept.put(store)
    digest = gone.put(store).digest
    assert store.remove(digest[:10]) == digest
    assert len(store.ls()) == 1 and store.find(gone.spec.digest, gone.ids) == []
    with pytest.raises(LayoutError, match="is not in"):
        store.get(digest)
    first = store.gc(grace_s=0)
    assert (first.blocks_condemned, first.blocks_deleted, first.documents) == (3, 0, 1)
    assert (blocks_of(store), blocks_of(store, "condemned")) == (3, 3)
    second = store.gc(grace_s=0)
    assert (second.blocks_condemned, second.blocks_deleted) == (0, 3) and second.bytes_freed > 3 * 64 * 256
    assert blocks_of(store, "condemned") == 0 and store.verify().ok
    assert store.gc(grace_s=0) == store.gc(grace_s=0, dry_run=True).__class__(False, 1, 0, 3, 0, 0, 0, 0, 0)


def test_gc__a_shared_beginning_stays_with_the_document_that_needs_it(store: BlockStore, make: Make) -> None:
    long = make(700)
    short_digest = long.start(520).put(store).digest
    store.remove(long.put(store).digest)
    assert store.gc(grace_s=0).blocks_condemned == 1
    store.gc(grace_s=0)
    assert torch.equal(store.get(short_digest).token_ids(), long.ids[:520]) and store.verify().ok


def test_gc__dry_run_says_the_same_and_changes_nothing(store: BlockStore, make: Make) -> None:
    make(300).put(store)
    store.remove(make(600, seed=1).put(store).digest)
    before = sorted((p, p.lstat().st_mtime_ns) for p in store.root.rglob("*"))
    plan = store.gc(grace_s=0, dry_run=True)
    assert sorted((p, p.lstat().st_mtime_ns) for p in store.root.rglob("*")) == before
    done = store.gc(grace_s=0)
    assert plan.dry_run and not done.dry_run and plan.blocks_condemned == done.blocks_condemned == 3


def test_gc__leaves_the_young_alone(store: BlockStore, make: Make) -> None:
    store.remove(make(600).put(store).digest)
    assert store.gc().blocks_condemned == 0 and blocks_of(store) == 3
    store.gc(grace_s=0)
    assert store.gc().blocks_deleted == 0 and blocks_of(store, "condemned") == 3
    with pytest.raises(LayoutError, match="grace_s must be at least 0"):
        store.gc(grace_s=-1)


def test_gc__a_document_published_again_gets_its_blocks_back(store: BlockStore, make: Make) -> None:
    sample = make(600)
    digest = sample.put(store).digest
    manifest = store.manifest_path(digest).read_bytes()
    store.remove(digest)
    store.gc(grace_s=0)
    assert blocks_of(store, "condemned") == 3
    store.manifest_path(digest).write_bytes(manifest)  # restored from a backup
    done = store.gc(grace_s=0)
    assert (done.blocks_restored, done.blocks_deleted) == (3, 0) and store.verify().ok
    assert sample.put(store).blocks_reused == 3


def test_gc__never_replaces_a_block_by_the_one_set_aside(store: BlockStore, make: Make) -> None:
    sample = make(300)
    store.remove(sample.put(store).digest)
    store.gc(grace_s=0)
    for path in store.root.glob("condemned/*"):
        path.write_bytes(b"damaged while it lay there")
    sample.put(store)
    assert store.gc(grace_s=0).blocks_restored == 0 and store.verify().ok


def test_gc__an_open_document_is_held_and_read_on(store: BlockStore, make: Make) -> None:
    sample = make(600)
    document = store.get(sample.put(store).digest)
    store.remove(document.manifest.digest)
    for _ in range(3):
        done = BlockStore(store.root).gc(grace_s=0)
        assert (done.removed_but_held, done.blocks_needed, done.blocks_condemned) == (1, 3, 0)
    assert torch.equal(document.token_ids(), sample.ids)
    del document
    python_gc.collect()
    assert store.gc(grace_s=0).blocks_condemned == 3


HOLDER = """
import sys, time
from kvkern.layout import BlockStore
document = BlockStore(sys.argv[1]).get(sys.argv[2])
print("open", flush=True)
time.sleep(600)
"""


def test_gc__the_lease_of_a_killed_process_is_void(store: BlockStore, make: Make) -> None:
    digest = make(600).put(store).digest
    env = {**os.environ, "PYTHONPATH": str(Path(kvkern.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root), digest], env=env, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "open\n"
        store.remove(digest)
        assert store.gc(grace_s=0).removed_but_held == 1 and blocks_of(store) == 3
        holder.kill()
    assert len(list(store.root.glob("leases/*"))) == 1
    done = store.gc(grace_s=0)
    assert (done.removed_but_held, done.blocks_condemned) == (0, 3)
    assert list(store.root.glob("leases/*")) == []


def test_lease__goes_with_the_document_and_the_file_with_the_store(store: BlockStore, make: Make) -> None:
    digests = [make(300, seed=seed).put(store).digest for seed in range(3)]
    store = BlockStore(store.root)
    documents = [store.get(digest) for digest in [*digests, digests[0]]]
    (lease,) = store.root.glob("leases/*")
    assert lease.read_text().split() == [f"+{digest}" for digest in digests]
    del documents[1:3]
    assert sorted(lease.read_text().split()[3:]) == sorted(f"-{digest}" for digest in digests[1:])
    for _ in range(50):
        store.get(digests[1])
    size = lease.stat().st_size
    documents.clear()
    assert lease.stat().st_size == 0 < size
    del store
    assert not lease.exists()


def test_lease__damaged_holds_everything_and_says_so(store: BlockStore, make: Make) -> None:
    document = store.get(make(300).put(store).digest)
    store.remove(make(600, seed=1).put(store).digest)
    (lease,) = store.root.glob("leases/*")
    lease.write_bytes(b"\xff" + lease.read_bytes())
    with pytest.warns(UserWarning, match="a lease holds lines"):
        done = store.gc(grace_s=0)
    assert done.removed_but_held == 1 and done.blocks_condemned == 0
    assert document.token_ids().numel() == 300


def test_lease__a_full_disk_does_not_keep_a_reader_out(store: BlockStore, make: Make) -> None:
    digest = make(300).put(store).digest
    full = refusing(("write",), errno.ENOSPC, after=0, always=True, under=store.root)
    with full, pytest.warns(UserWarning, match="no lease on"):
        assert store.get(digest).token_ids().numel() == 300


def test_gc__without_its_manifests_it_gives_no_block_up(store: BlockStore, make: Make) -> None:
    make(600).put(store)
    (store.root / "manifests").rename(store.root.with_name("mislaid"))
    with pytest.raises(LayoutError, match="nothing is collected"):
        store.gc(grace_s=0)
    store.root.with_name("mislaid").rename(store.root / "manifests")
    assert store.gc(grace_s=0).blocks_condemned == 0 and store.verify().ok


def test_gc__cleans_what_dead_publishers_left_and_not_what_living_ones_write(store: BlockStore, make: Make) -> None:
    make(300).put(store)
    dead, mine = "manifests/.tmp-4194305-00", f"manifests/.tmp-{os.getpid()}-00"
    for name in (dead, mine, "blocks/.tmp-x", "index/" + "0" * 64 + ".json"):
        (store.root / name).write_bytes(b"{")
    assert store.gc().others_deleted == 1  # the index file of no document
    assert store.gc(grace_s=0).others_deleted == 1
    assert not (store.root / dead).exists() and (store.root / mine).exists()


def test_gc__does_nothing_while_a_manifest_cannot_be_read(store: BlockStore, make: Make) -> None:
    damaged, gone = make(300), make(600, seed=1)
    digest = damaged.put(store).digest
    store.remove(gone.put(store).digest)
    path = store.manifest_path(digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{digest}.*Nothing is collected"):
        store.gc(grace_s=0)
    with pytest.raises(IntegrityError, match="quarantine"):
        store.get(digest)
    with pytest.raises(LayoutError, match="is damaged, so which blocks"):
        store.gc(grace_s=0)
    assert blocks_of(store) == 5 and not store.verify().ok
    with pytest.warns(UserWarning, match="publish it again"):
        assert store.ls() == []
    damaged.put(store)
    assert store.verify().ok and store.gc(grace_s=0).blocks_condemned == 3


def test_gc__without_locks_it_refuses(store: BlockStore, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    digest = make(300).put(store).digest
    assert store.get(digest).token_ids().numel() == 300
    with pytest.raises(LayoutError, match="knows no locks"):
        store.gc(grace_s=0)


def test_gc__a_failing_deletion_is_an_error_and_the_next_run_goes_on(store: BlockStore, make: Make) -> None:
    store.remove(make(600).put(store).digest)
    with refusing(("rename",), errno.EIO, after=1, under=store.root), pytest.raises(AccessError, match="condemned"):
        store.gc(grace_s=0)
    done = store.gc(grace_s=0)
    assert (done.blocks_condemned, done.blocks_deleted) == (2, 1)
    assert store.gc(grace_s=0).blocks_deleted == 2
