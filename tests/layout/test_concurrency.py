"""Concurrency: many processes on one store, and nobody loses a block or reads a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvkern

CHECKOUT = Path(kvkern.__file__).parents[1]


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=[pytest.mark.long, pytest.mark.slow])])
def test_store__eight_readers_two_publishers_and_gc_get_on(tmp_path: Path, seconds: int) -> None:
    command = [sys.executable, "-m", "tests.support.crowd", str(tmp_path / "store"), str(seconds)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=seconds + 120)
    assert done.returncode == 0, done.stderr
    did = json.loads(done.stdout)
    print(f"\n{did}")
    for what in ("reads", "documents published and removed", "runs of gc", "blocks condemned", "blocks deleted"):
        assert did.get(what, 0) > 0, what


PUBLISHER = """
import sys
from pathlib import Path
from tests.support.crashes import put
print("ready", flush=True)
sys.stdin.readline()
print(put(Path(sys.argv[1]), "other"))
"""


def test_store__two_processes_publish_one_document_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    publishers = [subprocess.Popen(command, cwd=CHECKOUT, **pipes) for _ in range(2)]
    for publisher in publishers:
        assert publisher.stdout.readline() == "ready\n"
    for publisher in publishers:
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
    digests = {publisher.communicate(timeout=60)[0].strip() for publisher in publishers}
    assert [publisher.returncode for publisher in publishers] == [0, 0] and len(digests) == 1
    assert len(list(tmp_path.glob("store/blocks/*/*"))) == 3 and len(list(tmp_path.glob("store/manifests/*"))) == 1
