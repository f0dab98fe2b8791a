"""Links in the place of a store's folders and files: nothing outside of the store is written, moved or deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import IntegrityError, LayoutError
from kvkern.layout import BlockStore, collect
from kvkern.layout.directory import FOLDERS

Make = Callable[..., Any]
Snapshot = dict[str, tuple[int, int, int]]
REMEDY = "is a link.*put the folder itself in its place"


@pytest.fixture
def victim(tmp_path: Path, make: Make) -> BlockStore:
    """Return another store, with a document, a removed one, blocks set aside, and what dead processes left."""
    other = BlockStore(tmp_path / "victim")
    make(600).put(other)
    other.remove(make(300, seed=1).put(other).digest)
    other.gc(grace_s=0)
    other.remove(make(300, seed=2).put(other).digest)
    for folder in FOLDERS:
        (other.root / folder).mkdir(exist_ok=True)
        (other.root / folder / ".tmp-4194305-00").write_bytes(b"{")
    (other.root / "leases" / "4194305-0123456789abcdef").write_bytes(b"")
    return other


def snapshot(root: Path) -> Snapshot:
    """Name, inode, size and mtime of everything below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(root))] = info.st_ino, info.st_size, info.st_mtime_ns
    return found


def link(path: Path, target: Path) -> None:
    """Put a link where a folder was, or where none is yet."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}-was-here"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def block_folder(store: BlockStore) -> str:
    """Return the name of a folder of blocks, such as `blocks/3f`."""
    return f"blocks/{min(path.name for path in store.root.glob('blocks/*') if len(path.name) == 2)}"


@pytest.mark.parametrize("folder", ["blocks/xx", *FOLDERS])
def test_gc__takes_nothing_of_another_store_through_a_linked_folder(
    store: BlockStore, make: Make, victim: BlockStore, folder: str
) -> None:
    make(300, seed=3).put(store)
    folder = block_folder(victim) if folder == "blocks/xx" else folder
    link(store.root / folder, victim.root / folder)
    theirs, ours = snapshot(victim.root), snapshot(store.root)
    for dry_run in (True, False, False):
        with pytest.raises(LayoutError, match=f"{store.root}/{folder}: .*{REMEDY}"):
            store.gc(grace_s=0, dry_run=dry_run)
    assert snapshot(victim.root) == theirs and snapshot(store.root) == ours


def test_gc__takes_nothing_through_a_folder_that_becomes_a_link_meanwhile(
    store: BlockStore, make: Make, victim: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what gc has seen and what it does then lies time: a name is not trusted twice."""
    sample = make(600)  # the very blocks that the other store needs
    store.remove(sample.put(store).digest)
    folder, plan = block_folder(store), collect._Plan.carry_out

    def swapped(self: Any) -> None:
        link(store.root / folder, victim.root / folder)
        plan(self)

    monkeypatch.setattr(collect._Plan, "carry_out", swapped)
    theirs = snapshot(victim.root)
    with pytest.raises(LayoutError, match=f"{store.root}/{folder}: .*{REMEDY}"):
        store.gc(grace_s=0)
    assert snapshot(victim.root) == theirs


@pytest.mark.parametrize("folder", ["blocks/xx", *FOLDERS])
def test_put__writes_into_no_linked_folder(
    store: BlockStore, make: Make, tmp_path: Path, victim: BlockStore, folder: str
) -> None:
    sample = make(300, seed=3)
    digest = sample.put(victim).digest
    folder = f"blocks/{victim.manifest(digest).blocks[0][:2]}" if folder == "blocks/xx" else folder
    (tmp_path / "elsewhere").mkdir()
    link(store.root / folder, tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=f"{store.root}/{folder}: .*{REMEDY}"):
        sample.put(store)
    assert store.directory.digests() == [] and list((tmp_path / "elsewhere").iterdir()) == []


def test_put_table__writes_into_no_linked_folder(store: BlockStore, tmp_path: Path) -> None:
    link(store.root / "tables", tmp_path)
    with pytest.raises(LayoutError, match=f"{store.root}/tables: .*{REMEDY}"):
        store.put_table(b"cos and sin")
    assert not list(tmp_path.glob("*.bin"))


def test_put__takes_no_block_for_granted_that_lies_behind_a_link(
    store: BlockStore, make: Make, victim: BlockStore
) -> None:
    sample = make(600)
    blocks = victim.manifest(sample.put(victim).digest).blocks
    for name in {block_id[:2] for block_id in blocks}:
        link(store.root / "blocks" / name, victim.root / "blocks" / name)
    with pytest.raises(LayoutError, match=REMEDY):
        sample.put(store)
    assert store.ls() == []


@pytest.mark.parametrize("folder", ["manifests", "removed"])
def test_remove__moves_nothing_through_a_link(store: BlockStore, make: Make, victim: BlockStore, folder: str) -> None:
    digest = make(600).put(store).digest
    link(store.root / folder, victim.root / folder)
    theirs = snapshot(victim.root)
    with pytest.raises(LayoutError, match=f"{store.root}/{folder}: .*{REMEDY}"):
        store.remove(digest)
    assert snapshot(victim.root) == theirs


@pytest.mark.parametrize("folder", ["blocks/xx", "quarantine"])
def test_get__sets_nothing_aside_through_a_link(store: BlockStore, make: Make, tmp_path: Path, folder: str) -> None:
    digest = make(300).put(store).digest
    path = store.block_path(store.manifest(digest).blocks[0])
    path.write_bytes(path.read_bytes()[:-1])
    folder = f"blocks/{path.parent.name}" if folder == "blocks/xx" else folder
    away = tmp_path / "away"
    (store.root / folder).rename(away) if folder != "quarantine" else away.mkdir()
    link(store.root / folder, away)
    before = snapshot(away)
    with pytest.raises(IntegrityError, match=f"could not be moved to quarantine .*{store.root}/{folder}: .*{REMEDY}"):
        store.get(digest)
    assert snapshot(away) == before and path.exists()


@pytest.mark.filterwarnings("ignore:.*is missing; rebuilding it", "ignore:no lease on")
def test_get__reads_through_a_linked_folder_and_writes_no_lease_there(
    store: BlockStore, make: Make, tmp_path: Path
) -> None:
    sample = make(300)
    digest = sample.put(store).digest
    for folder in ("blocks", "manifests", "leases", "index"):
        (tmp_path / folder).mkdir()
        (store.root / folder).exists() and (store.root / folder).rename(tmp_path / folder)
        link(store.root / folder, tmp_path / folder)
    (tmp_path / "index" / f"{digest}.json").unlink()
    again = BlockStore(store.root)
    with pytest.warns(UserWarning, match=f"no lease on .*{store.root}/leases: .*{REMEDY}"):
        assert again.get(digest).token_ids().tolist() == sample.ids.tolist()
    with pytest.warns(UserWarning, match=f"could not be written .*{store.root}/index: .*{REMEDY}"):
        assert again.find(sample.spec.digest, sample.ids) == [(digest, 300)]
    assert list((tmp_path / "leases").iterdir()) == [] == list((tmp_path / "index").iterdir())


def test_store__as_a_whole_may_be_a_link(make: Make, tmp_path: Path) -> None:
    BlockStore(tmp_path / "far" / "away")
    (tmp_path / "here").symlink_to(tmp_path / "far" / "away")
    store = BlockStore(tmp_path / "here")
    digest = make(300).put(store).digest
    assert store.get(digest).token_ids().numel() == 300 and store.verify().ok
    store.remove(digest)
    assert (store.gc(grace_s=0).blocks_condemned, store.gc(grace_s=0).blocks_deleted) == (2, 2)
    assert (tmp_path / "here").is_symlink()


def test_remove__touches_nothing_that_a_link_in_the_place_of_a_manifest_names(
    store: BlockStore, make: Make, tmp_path: Path
) -> None:
    path = store.manifest_path(make(300).put(store).digest)
    away = path.rename(tmp_path / "away")
    path.symlink_to(away)
    os.utime(away, (1, 1))
    store.remove(path.stem)
    assert away.stat().st_mtime == 1 and not os.path.lexists(path)


def test_gc__a_strange_thing_with_a_good_name_stops_no_run(store: BlockStore, make: Make, tmp_path: Path) -> None:
    """Folders and links where files should be are left where they are, and what is a file is still collected."""
    sample = make(300)
    digest = sample.put(store).digest
    block_id = store.manifest(digest).blocks[0]
    store.remove(make(600, seed=1).put(store).digest)
    strange = [store.root / "index" / f"{'0' * 64}.json", store.root / "condemned" / f"{'0' * 64}.safetensors"]
    for path in strange:
        path.mkdir(parents=True)
    strange.append(store.root / "condemned" / f"{block_id}.safetensors")
    strange[-1].symlink_to(store.block_path(block_id).rename(tmp_path / "away"))
    assert store.gc(grace_s=0).blocks_condemned == 3
    assert store.gc(grace_s=0).blocks_deleted == 3
    assert all(os.path.lexists(path) for path in strange) and not store.block_path(block_id).exists()


def test_gc__a_folder_in_the_place_of_a_lease_holds_everything(store: BlockStore, make: Make) -> None:
    store.remove(make(300).put(store).digest)
    lease = store.root / "leases" / "1-0123456789abcdef"
    lease.mkdir(parents=True)
    with pytest.warns(UserWarning, match=f"{lease}.*nothing that was removed is collected"):
        assert store.gc(grace_s=0).blocks_condemned == 0
    lease.rmdir()
    assert store.gc(grace_s=0).blocks_condemned == 2


def test_gc__hard_links_into_another_store_cost_it_nothing(store: BlockStore, make: Make, victim: BlockStore) -> None:
    """A copy by `cp -al` shares every inode; deleting names here deletes none there, and nothing is written."""
    digest = make(520, seed=4).put(victim).digest
    for folder in ("blocks", "manifests"):
        for path in (victim.root / folder).rglob("*.*"):
            target = store.root / path.relative_to(victim.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    for name in store.directory.digests():
        store.remove(name)
    store.gc(grace_s=0)
    store.gc(grace_s=0)
    assert list(store.root.glob("blocks/*/*.safetensors")) == [] and victim.verify().ok and victim.get(digest)
