"""Hostile input: a parser takes what FORMAT.md allows, or refuses it by name, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvkern
from kvkern.errors import KvkernError, LayoutError
from kvkern.layout import BlockStore
from kvkern.spec import KVSpec
from tests.support.parsers import PARSERS, SPEC, TOKENS

SHORT, LONG = 400, 20_000  # inputs per parser; five parsers
GUIDED = 200_000
CHECKOUT = Path(kvkern.__file__).parents[1]
MEMORY_PER_INPUT_BYTES = 4 << 20
TOKENS_OF_JSON = [
    b"{}", b"[]", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000, b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000,
    b'"count":1,"count":2', b"18446744073709551615", b"-0", b"1.0", b"\x00", b"\xff\xfe", b"../../etc/passwd",
    b" " * 5000, (1 << 63).to_bytes(8, "little"), (4088).to_bytes(8, "little"), b'"data_offsets":[0,1]', b"..", b"\n",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw what is left of a valid file after a few edits, or no file at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(data), 1500)))
        length = draw(st.integers(0, 40))
        piece = draw(st.one_of(st.binary(max_size=12), st.sampled_from(TOKENS_OF_JSON), st.just(bytes(data[:64]))))
        data[start : start + length] = piece
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("inputs", [SHORT, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.slow])])
def test_fuzz__no_crash_and_bounded_memory(name: str, inputs: int) -> None:
    parse, valid = PARSERS[name]
    parse(valid)
    tried, passed, largest = 0, 0, 0

    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(valid))
    def run(data: bytes) -> None:
        nonlocal tried, passed, largest
        tried += 1
        watched = tried % 16 == 0
        if watched:
            tracemalloc.start()
        try:
            parse(data)
            passed += 1
        except KvkernError as error:
            assert str(error)
        finally:
            if watched:
                largest = max(largest, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()

    run()
    print(f"\n{name}: {tried:,} inputs, {passed:,} accepted, at most {largest:,} bytes for one")
    assert tried >= inputs and largest < MEMORY_PER_INPUT_BYTES


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_fuzz__guided_by_coverage(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    command = [sys.executable, "-m", "tests.support.guided", name, str(GUIDED), str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {GUIDED} runs" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("claimed", [1 << 17, 1 << 40, (1 << 64) - 1])
def test_header__a_claimed_length_is_never_allocated(claimed: int) -> None:
    data = claimed.to_bytes(8, "little") + b"{" + b" " * 8183
    with pytest.raises(LayoutError, match=f"header length: got {claimed}"):
        PARSERS["shard"][0](data)


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "..", "a" * 63 + "/", "A" * 64, "%2e%2e%2f" * 7 + "a", "a" * 65]
)
def test_store__a_name_never_leaves_the_store(tmp_path: Path, name: str) -> None:
    store = BlockStore(tmp_path / "store")
    for call in (store.get, store.manifest, store.remove, store.verify):
        with pytest.raises(LayoutError, match="digest"):
            call(name)
    data = json.loads(PARSERS["manifest"][1])
    data["blocks"][0] = name
    hostile = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(hostile).hexdigest()
    store.manifest_path(digest).parent.mkdir()
    store.manifest_path(digest).write_bytes(hostile)
    with pytest.raises(LayoutError, match=r"blocks\[0\]"):
        store.get(digest)


def test_store__links_and_pipes_in_the_place_of_files_are_refused(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "store")
    k = torch.ones(1, 1, 70, 64).bfloat16()
    digest = store.put(SPEC, TOKENS, k, k).digest
    for path in (store.block_path(store.manifest(digest).blocks[0]), store.manifest_path(digest)):
        away = path.rename(tmp_path / "away")
        path.symlink_to(away)
        with pytest.raises(LayoutError, match="regular file"):
            store.get(digest)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(LayoutError, match="regular file"):
            store.get(digest)
        path.unlink()
        path.mkdir()
        with pytest.raises(LayoutError, match="regular file"):
            store.get(digest)
        path.rmdir()
        away.rename(path)
    assert store.get(digest).token_ids().numel() == 70


def test_store__no_pickle_in_reach() -> None:
    """Reading a store imports no module that could run what a file says; ruff keeps the source free of them."""
    code = """
import sys, torch, safetensors.torch, xxhash, numpy
sys.modules["pickle"] = None
import kvkern.layout, tempfile
store = kvkern.layout.BlockStore(tempfile.mkdtemp())
spec = kvkern.KVSpec("0" * 64, "X", 1, 1, 1, 64, config={})
k = torch.ones(1, 1, 300, 64).bfloat16()
store.get(store.put(spec, range(300), k, k).digest)
assert store.verify().ok
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("value", [1, [], "x", None, {"weights": []}, {1: 2}])
def test_spec__an_object_that_is_no_spec_is_refused(value: Any) -> None:
    with pytest.raises(LayoutError):
        KVSpec.from_json(value)
