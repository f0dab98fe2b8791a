"""Crashes: a process may die, or be refused, at any step; what was published stays, and no half document shows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvkern
from kvkern.errors import AccessError
from kvkern.layout import BlockStore
from tests.support.store_faults import refusing

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "utime", "listdir", "lstat", "fstat", "ftruncate")


def test_store__killed_at_every_step_it_opens_and_loses_at_most_the_unpublished(tmp_path: Path) -> None:
    checkout = Path(kvkern.__file__).parents[1]
    command = [sys.executable, "-m", "tests.support.crashes", str(tmp_path)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    crashes = json.loads(done.stdout)
    assert len(crashes) == 10 and min(crashes.values()) >= 10
    print(f"\n{sum(crashes.values())} processes killed: {crashes}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("action", ["put", "remove", "gc"])
def test_store__refused_at_every_step_nothing_is_visible_and_nothing_is_lost(
    store: BlockStore, make: Callable[..., Any], action: str, code: int
) -> None:
    kept, other = make(300), make(600, seed=1)
    kept_digest = kept.put(store).digest
    if action != "put":
        store.remove(other.put(store).digest)
    refusals, step, failed = 0, 0, ["first"]
    while failed:
        root = store.root.with_name(f"copy-{step}")
        shutil.copytree(store.root, root)
        copy = BlockStore(root)
        act = {
            "put": lambda copy=copy: other.put(copy),
            "remove": lambda copy=copy: copy.remove(kept_digest),
            "gc": lambda copy=copy: copy.gc(grace_s=0),
        }[action]
        with warnings.catch_warnings(), refusing(CALLS, code, after=step, under=root) as failed:
            warnings.simplefilter("ignore")
            try:
                act()
            except AccessError as error:
                assert error.errno == code and str(root) in str(error)
                refusals += 1
        assert not list(root.rglob(".tmp-*")) and not list(root.glob("quarantine/*"))
        listed = {line.digest for line in copy.ls()}
        assert kept_digest in listed or action == "remove"
        assert copy.verify().ok
        other.put(copy)
        kept.put(copy)
        assert copy.verify().ok and len(copy.ls()) == 2
        step += 1
    assert refusals >= 3
    print(f"\n{action}: {step} steps, {refusals} refused with {errno.errorcode[code]}")


def test_put__nothing_is_visible_when_the_disk_is_full(store: BlockStore, make: Callable[..., Any]) -> None:
    sample = make(600)
    full = refusing(("write",), errno.ENOSPC, after=2, under=store.root)
    with full, pytest.raises(AccessError, match="No space left on device. Free some space"):
        sample.put(store)
    assert store.ls() == [] and sample.put(store).tokens == 600


def test_store__a_read_only_one_is_read_and_refuses_to_publish(store: BlockStore, make: Callable[..., Any]) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    writing = ("write", "mkdir", "rename", "replace", "fsync", "unlink", "utime")
    with refusing(writing, errno.EROFS, after=0, always=True, under=store.root):
        again = BlockStore(store.root)
        assert again.get(digest).token_ids().tolist() == sample.ids.tolist()
        assert again.find(sample.spec.digest, sample.ids) == [(digest, 300)] and again.verify().ok
        with pytest.raises(AccessError, match="read-only"):
            make(400, seed=5).put(again)


def test_store__needs_no_hard_links(
    store: BlockStore, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    digest = make(600).put(store).digest
    store.remove(digest)
    assert store.gc(grace_s=0).blocks_condemned == 3 and make(600).put(store).tokens == 600
