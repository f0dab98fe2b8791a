"""Twins: csrc_ref with one thing wrong, which the tests must notice."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from kvkern.kernels import native


def build_twin(twin: tuple[str, str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Compile csrc_ref with one line replaced."""
    file, right, wrong = twin
    shutil.copytree(native.source_dir(), folder / "csrc")
    source = folder / "csrc" / file
    assert right in source.read_text(), "the twin no longer fits the source"
    source.write_text(source.read_text().replace(right, wrong))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return native.load_library(native.compile_library(native.plan_build(folder / "csrc")))
