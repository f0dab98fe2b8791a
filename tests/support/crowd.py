"""A crowd on one store: readers, publishers and gc in processes of their own, for some seconds.

`python -m tests.support.crowd ROOT SECONDS` prints how often each did what; the first error ends it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from kvkern.errors import LayoutError
from kvkern.layout import BlockStore, shard
from tests.support.crashes import SPEC, check_bits, document

READERS, PUBLISHERS = 8, 2
KEPT = {1: 300, 2: 700, 3: 520}
"""Seed and length of the documents that nobody removes."""


def kept_digests(root: Path) -> dict[str, int]:
    """Publish the documents that stay."""
    return {put(root, seed, n): seed for seed, n in KEPT.items()}


def put(root: Path, seed: int, n: int) -> str:
    """Publish a document whose first block all documents share."""
    ids, kv = document(n, seed)
    return BlockStore(root).put(SPEC, ids, kv, -kv).digest


def read(root: Path, kept: dict[str, int], done: Counter[str]) -> None:
    """Open a document that stays, and one that may be going; every bit of the first is checked."""
    shard._VERIFIED.clear()
    digest, seed = random.choice(list(kept.items()))
    check_bits(BlockStore(root), digest, *document(KEPT[seed], seed))
    done["reads"] += 1
    store = BlockStore(root)
    try:
        store.get(random.choice(store.directory.digests()))
        done["reads of any document"] += 1
    except LayoutError as error:
        if "is not in" not in str(error) and "just been removed" not in str(error):
            raise
        done["reads that came too late"] += 1


def publish(root: Path, number: int, done: Counter[str]) -> None:
    """Publish, read back, remove."""
    seed, n = 10 + number + PUBLISHERS * random.randrange(5), random.choice((257, 512, 600))
    digest = put(root, seed, n)
    store = BlockStore(root)
    check_bits(store, digest, *document(n, seed))
    put(root, *random.choice(list(KEPT.items())))  # somebody else publishes the same document
    store.remove(digest)
    done["documents published and removed"] += 1


def collect(root: Path, done: Counter[str]) -> None:
    """Collect without any grace."""
    found = BlockStore(root).gc(grace_s=0)
    done["runs of gc"] += 1
    done["blocks condemned"] += found.blocks_condemned
    done["blocks restored"] += found.blocks_restored
    done["blocks deleted"] += found.blocks_deleted


def main(root: Path, seconds: float) -> None:
    """Run the crowd."""
    torch.set_num_threads(1)
    kept = kept_digests(root)
    roles: list[Callable[[Counter[str]], None]] = [lambda done: read(root, kept, done)] * READERS
    roles += [lambda done, i=i: publish(root, i, done) for i in range(PUBLISHERS)]
    roles.append(lambda done: collect(root, done))
    deadline, children = time.monotonic() + seconds, []
    for number, role in enumerate(roles):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(_act(role, number, deadline, writing))
        os.close(writing)
        children.append((pid, reading))
    total, codes = Counter[str](), []
    for pid, reading in children:
        with os.fdopen(reading) as report:
            total += Counter(json.loads(report.read() or "{}"))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert not any(codes), codes
    store = BlockStore(root)
    for digest, seed in kept.items():
        check_bits(store, digest, *document(KEPT[seed], seed))
    assert store.verify().ok and not list(root.glob("quarantine/*"))
    print(json.dumps(total))


def _act(role: Callable[[Counter[str]], None], number: int, deadline: float, report: int) -> int:
    random.seed(number)
    done = Counter[str]()
    try:
        while time.monotonic() < deadline:
            role(done)
    except BaseException:
        traceback.print_exc()
        return 1
    os.write(report, json.dumps(done).encode())
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
