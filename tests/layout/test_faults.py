"""Faults: whatever happens to a store, no wrong byte is delivered, no good file is lost, and the refusal is clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkern.layout.directory import Directory
from kvkern.layout.files import DamagedFile
from tests.support.store_faults import FaultyStore

SHORT, LONG = 3_000, 100_000
NEVER_HARMFUL = ("none", "index of another document", "stale index", "every call fails that writes")
MUST_REFUSE = ("two valid blocks swapped", "manifest of another document", "bit flip in what is read", "truncation")


@pytest.mark.parametrize(
    "loads", [SHORT, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.slow])], ids=["short", "long"]
)
def test_faults__no_wrong_byte_and_no_good_file_lost(tmp_path: Path, loads: int) -> None:
    store = FaultyStore(tmp_path / "store", seed=loads)
    names = list(store.faults)
    for i in range(loads):
        store.load(names[i % len(names)])
    for name in NEVER_HARMFUL:
        assert not store.refused(name), f"{name} must not keep a reader from its document"
    for name in MUST_REFUSE:
        assert store.refused(name), f"{name} was never noticed"
    print(f"\n{loads:,} loads", *(f"  {key:55} {n:7,}" for key, n in sorted(store.outcomes.items())), sep="\n")


def test_faults__the_injector_notices_a_store_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.layout import shard

    store = FaultyStore(tmp_path / "store")
    monkeypatch.setattr(shard.Verification, "_checked", lambda self: b"")
    with pytest.raises(AssertionError, match="wrong"):
        for _ in range(500):
            store.load("bit flip in what is read")


def test_faults__the_injector_notices_a_store_that_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(self: Directory, damaged: DamagedFile, *, wait: bool) -> str:
        damaged.path.unlink()
        return "gone"

    store = FaultyStore(tmp_path / "store")
    monkeypatch.setattr(Directory, "quarantine", delete)
    with pytest.raises(AssertionError, match="deleted"):
        for _ in range(500):
            store.load("bit flip in what is read")
