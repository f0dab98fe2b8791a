"""Kernels run in Triton's interpreter here: without the work that it throws away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.interpreter import lean_interpreter


@pytest.fixture(scope="session", autouse=True)
def lean() -> Iterator[None]:
    with lean_interpreter():
        yield
