"""A store that several users share by a common group, or that some may only read."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkern.errors import AccessError
from kvkern.layout import BlockStore

Make = Callable[..., Any]
FIRST, SECOND, STRANGER = 12345, 12346, 65534
GROUP = 12399

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a second user")


def as_user(uid: int, action: Callable[[], Any], *, umask: int = 0o002) -> None:
    """Run something in a forked process as another user, who is in the group unless a stranger."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            torch.set_num_threads(1)
            os.setgroups([GROUP] if uid != STRANGER else [])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(umask)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                action()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode(errors="replace")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a directory that belongs to a group and gives what is made in it to the group, as `chmod 2775` does."""
    root = Path(tempfile.mkdtemp(prefix="kvkern-shared-"))  # every user can reach it; tmp_path is the tester's own
    os.chown(root, FIRST, GROUP)
    root.chmod(0o2775)
    yield root
    shutil.rmtree(root)


def modes(store: BlockStore) -> tuple[set[str], set[str]]:
    """Permissions of the folders and of the files in a store, as `ls` numbers."""
    paths = sorted(store.root.rglob("*"))
    found = [(stat.S_ISDIR(path.stat().st_mode), oct(path.stat().st_mode & 0o777)) for path in paths]
    return {mode for is_folder, mode in found if is_folder}, {mode for is_folder, mode in found if not is_folder}


@pytest.mark.parametrize(
    ("umask", "folders", "files"), [(0o002, "0o775", "0o664"), (0o022, "0o755", "0o644"), (0o077, "0o700", "0o600")]
)
def test_store__honours_the_umask(make: Make, tmp_path: Path, umask: int, folders: str, files: str) -> None:
    before = os.umask(umask)
    try:
        store = BlockStore(tmp_path / "store")
        document = store.get(make(300).put(store).digest)
        store.put_table(b"cos and sin")
        store.remove(make(520, seed=1).put(store).digest)
        store.gc(grace_s=3600)
    finally:
        os.umask(before)
    assert {path.name for path in store.root.iterdir()} >= {"blocks", "lock", "leases", "tables", "removed", "format"}
    assert modes(store) == ({folders}, {files}) and document
    assert oct(store.root.stat().st_mode & 0o777) == folders


@as_root
def test_store__a_second_user_of_the_group_publishes_reads_removes_and_collects(make: Make, shared: Path) -> None:
    theirs, mine = make(600), make(700)

    def first() -> None:
        assert theirs.put(BlockStore(shared)).blocks_new == 3

    def second() -> None:
        store = BlockStore(shared)
        assert mine.put(store).blocks_new == 3  # its spec is the same, its tokens are others
        for line in store.ls():
            assert store.get(line.digest).token_ids().numel() == line.tokens
            store.remove(line.digest)
        assert store.gc(grace_s=0).blocks_condemned == 6 and store.gc(grace_s=0).blocks_deleted == 6

    as_user(FIRST, first)
    as_user(SECOND, second)
    as_user(FIRST, first)


@as_root
def test_store__of_files_that_only_their_owner_may_write_serves_the_group_too(make: Make, shared: Path) -> None:
    """As an earlier kvkern made them: lock and blocks 0644, in folders that the group may write."""
    sample = make(600)
    as_user(FIRST, lambda: sample.put(BlockStore(shared)))
    for path in shared.rglob("*"):
        path.chmod(0o2775 if path.is_dir() else 0o644)

    def second() -> None:
        store = BlockStore(shared)
        make(300, seed=1).put(store)
        document = store.get(sample.put(store).digest)
        assert len(list(shared.glob("leases/*"))) == 1
        store.remove(document.manifest.digest)
        assert store.gc(grace_s=0).removed_but_held == 1
        del document
        assert store.gc(grace_s=0).blocks_condemned == 3 and store.gc(grace_s=0).blocks_deleted == 3
        assert store.verify().ok

    as_user(SECOND, second)


@as_root
def test_store__a_file_of_the_lock_that_one_may_only_read_still_locks(make: Make, shared: Path) -> None:
    as_user(FIRST, lambda: make(300).put(BlockStore(shared)), umask=0o022)

    def second() -> None:
        store = BlockStore(shared)
        with store.directory.lock(exclusive=True) as is_locked:
            assert is_locked
            with (
                pytest.raises(AccessError, match="holds the store's lock"),
                BlockStore(shared).directory.lock(exclusive=False, wait=False),
            ):
                pass

    as_user(SECOND, second)


@as_root
def test_store__a_damaged_block_of_another_user_is_healed(make: Make, shared: Path) -> None:
    sample = make(300)
    as_user(FIRST, lambda: sample.put(BlockStore(shared)))
    path = sorted(shared.glob("blocks/*/*"))[0]
    path.write_bytes(path.read_bytes()[:-1])

    def second() -> None:
        store = BlockStore(shared)
        assert sample.put(store).blocks_new == 1 and store.verify().ok

    as_user(SECOND, second)
    assert len(list(shared.glob("quarantine/*"))) == 1


@as_root
@pytest.mark.parametrize("has_lock", [True, False])
def test_store__a_stranger_reads_and_changes_nothing(make: Make, shared: Path, has_lock: bool) -> None:
    sample = make(300)
    as_user(FIRST, lambda: sample.put(BlockStore(shared)), umask=0o022)
    if not has_lock:
        (shared / "lock").unlink()
    damaged = make(520, seed=1)
    as_user(FIRST, lambda: damaged.put(BlockStore(shared)) if has_lock else None)
    wrong = sorted(path for path in shared.glob("blocks/*/*"))[-1]
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}

    def stranger() -> None:
        store = BlockStore(shared)
        for line in store.ls():
            assert store.get(line.digest).token_ids().numel() == line.tokens
        assert store.find(sample.spec.digest, sample.ids)[0][1] == 300 and store.verify().ok
        with pytest.raises(AccessError, match="Ask for permission"):
            make(400, seed=5).put(store)

    def stranger_meets_damage() -> None:
        (defect,) = BlockStore(shared).verify().defects
        assert "could not be moved to quarantine now" in defect.problem and "Ask for permission" in defect.problem

    as_user(STRANGER, stranger)
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
    wrong.write_bytes(wrong.read_bytes()[:-1])
    as_user(STRANGER, stranger_meets_damage)
    assert wrong.exists() and not list(shared.glob("quarantine/*"))


@as_root
def test_lease__of_another_user_is_honoured(make: Make, shared: Path) -> None:
    before = os.umask(0o002)
    try:
        store = BlockStore(shared)
        document = store.get(make(300).put(store).digest)
    finally:
        os.umask(before)

    def second() -> None:
        BlockStore(shared).remove(document.manifest.digest)
        done = BlockStore(shared).gc(grace_s=0)
        assert (done.removed_but_held, done.blocks_condemned) == (1, 0)

    as_user(SECOND, second)
    assert document.token_ids().numel() == 300
