"""A process that kills itself at one step of an action on a store, and what is left then.

`python -m tests.support.crashes ROOT` runs every action once per step, each time in a forked process that ends by
SIGKILL just before that step, or in the middle of it when it is a write, and prints what was tried as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvkern.errors import IntegrityError
from kvkern.layout import BlockStore
from kvkern.spec import KVSpec

SPEC = KVSpec("5" * 64, "TinyForCausalLM", 1, 2, 1, 64, config={})
STEPS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "utime", "close", "ftruncate")
CRASHED = -signal.SIGKILL


def document(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and KV whose first 256 tokens are the same for every seed."""
    ids = torch.arange(n)
    ids[256:] += 1000 * seed
    kv = (ids[:, None] * 64 + torch.arange(64)).sin().bfloat16()[None, None]
    return ids, kv


DOCUMENTS = {"kept": document(300, 1), "other": document(700, 2)}


def put(root: Path, name: str) -> str:
    """Publish one of the documents."""
    ids, kv = DOCUMENTS[name]
    return BlockStore(root).put(SPEC, ids, kv, -kv).digest


def gc(root: Path) -> None:
    """Collect without a grace period."""
    BlockStore(root).gc(grace_s=0)


def blocks(root: Path) -> list[Path]:
    """List the blocks in place."""
    return sorted(root.glob("blocks/*/*.safetensors"))


def damage(root: Path) -> None:
    """Damage a block that both documents share."""
    shared = set(BlockStore(root).manifest(put(root, "kept")).blocks)
    shared &= set(BlockStore(root).manifest(put(root, "other")).blocks)
    path = BlockStore(root).block_path(shared.pop())
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)


def remove_other(root: Path) -> None:
    """Remove the other document."""
    BlockStore(root).remove(put(root, "other"))


def read_damaged(root: Path) -> None:
    """Meet the damaged block."""
    store = BlockStore(root)
    for line in store.ls():
        try:
            store.get(line.digest)
        except IntegrityError:
            continue


@dataclass(frozen=True)
class Action:
    """What is prepared, what is killed, and whether the kept document is whole throughout."""

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    keeps: bool = True


def _removed_and_condemned(root: Path) -> None:
    remove_other(root)
    gc(root)
    gc(root)


ACTIONS = {
    "publish into an empty store": Action(lambda root: None, lambda root: put(root, "other"), keeps=False),
    "publish beside a shared beginning": Action(lambda root: put(root, "kept"), lambda root: put(root, "other")),
    "publish again": Action(lambda root: put(root, "kept"), lambda root: put(root, "kept")),
    "publish over a damaged block": Action(damage, lambda root: put(root, "kept"), keeps=False),
    "quarantine": Action(damage, read_damaged, keeps=False),
    "read": Action(lambda root: put(root, "kept"), lambda root: BlockStore(root).get(put(root, "kept"))),
    "remove": Action(lambda root: (put(root, "kept"), put(root, "other")), remove_other),
    "gc, first phase": Action(lambda root: (put(root, "kept"), remove_other(root)), gc),
    "gc, second phase": Action(lambda root: (put(root, "kept"), _removed_and_condemned(root)), gc),
    "gc that restores": Action(lambda root: (put(root, "kept"), _removed_and_condemned(root), put(root, "other")), gc),
}


def crash(action: Callable[[], Any], step: int, *, torn: bool) -> int:
    """Run an action in a forked process that is killed at a step; returns its exit code, CRASHED if it was."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def wrap(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == step:
                    if torn and name == "write":
                        real(args[0], memoryview(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, wrap(name))
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(root: Path, *, keeps: bool) -> None:
    """Assert that the store opens, shows whole documents only, and is clean after gc."""
    store = BlockStore(root)
    digests = {put_digest(name): name for name in DOCUMENTS}
    listed = {line.digest for line in store.ls()}
    assert listed <= set(digests), "a document that nobody published"
    if keeps:
        assert put_digest("kept") in listed, "the published document is gone"
        assert store.verify().ok, store.verify().defects
        for digest in listed:
            check_bits(store, digest, *DOCUMENTS[digests[digest]])
    for name in DOCUMENTS:  # whatever was lost can be published again
        put(root, name)
    del store
    gc(root)
    gc(root)
    gc(root)
    assert BlockStore(root).verify().ok
    assert len(blocks(root)) == 4, "blocks that nobody needs are left"
    left = [path for path in root.rglob("*") if path.name.startswith(".tmp-") or path.parent.name == "condemned"]
    assert not left and not list(root.glob("leases/*")), left


def check_bits(store: BlockStore, digest: str, ids: torch.Tensor, kv: torch.Tensor) -> None:
    """Assert that a document has the bits that were published."""
    found = store.get(digest)
    assert torch.equal(found.token_ids(), ids)
    k, _ = found.kv()
    assert torch.equal(k.view(torch.int16), kv.view(torch.int16)), "wrong bits"


def put_digest(name: str) -> str:
    """Return the digest that a document has in any store."""
    return _DIGESTS[name]


_DIGESTS: dict[str, str] = {}


def main(folder: Path) -> None:
    """Crash every action at every step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in DOCUMENTS:
        _DIGESTS[name] = put(folder / "names", name)
    tried = {}
    for name, action in ACTIONS.items():
        prepared = folder / "prepared"
        BlockStore(prepared)
        action.prepare(prepared)
        crashes = 0
        for torn in (False, True):
            step, code = 0, CRASHED
            while code == CRASHED:
                step += 1
                root = folder / "store"
                shutil.copytree(prepared, root, symlinks=True)
                code = crash(partial(action.run, root), step, torn=torn)
                crashes += code == CRASHED
                assert code in (0, CRASHED), f"{name}: step {step} failed"
                check(root, keeps=action.keeps)
                shutil.rmtree(root)
        tried[name] = crashes
        shutil.rmtree(prepared)
    print(json.dumps(tried))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
