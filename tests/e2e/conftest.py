"""Fixtures of the end-to-end tests: every test gets an unpatched model back, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvkern
from kvkern.model_patch.store import Prefix
from tests.support.models import Subject, subject


@pytest.fixture(params=["smollm2", "small_qwen3"])
def who(request: pytest.FixtureRequest) -> Iterator[Subject]:
    found = subject(request.param)
    kvkern.unpatch(found.model)
    yield found
    kvkern.unpatch(found.model)


@pytest.fixture
def attach(tmp_path: Path) -> Callable[[Subject, list[int]], Prefix]:
    """Publish a document with stock eager, then open it for the same model, patched."""

    def publish_and_open(who: Subject, doc: list[int]) -> Prefix:
        store = kvkern.Store(tmp_path / "store")
        kvkern.unpatch(who.model)
        done = store.publish(who.model, doc, attention="model")
        kvkern.patch(who.model)
        return store.open(done.digest, who.model)

    return publish_and_open
