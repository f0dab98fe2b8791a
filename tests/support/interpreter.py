"""Triton's interpreter at a third of its cost: without work whose result it throws away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter

from kvkern.kernels import triton_door

needs_interpreter = pytest.mark.skipif(
    not triton_door.is_interpreted(), reason="Triton was imported without TRITON_INTERPRET=1"
)

PLACES = (
    (interpreter, "_patch_lang"),
    (interpreter.GridExecutor, "__call__"),
    (interpreter.interpreter_builder, "options"),
)
STOCK = tuple(getattr(owner, name) for owner, name in PLACES)


class _Kept:
    """The scope of a call whose patches are in place already."""

    def restore(self) -> None:
        """Leave them: they belong to the launch."""


@contextmanager
def lean_interpreter() -> Iterator[None]:
    """Let a launch patch each language module once, and form no overflow check that nobody reads.

    The patches of a device function are those that its kernel's launch has made already, and nobody takes them back
    before the launch ends. Overflow is asserted under `debug` only, yet its check is computed always. So what a kernel
    computes does not change.
    """
    before = tuple(getattr(owner, name) for owner, name in PLACES)
    patch_lang, call, options = STOCK
    modules_of: dict[Callable[..., Any], frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def patch_what_is_new(fn: Callable[..., Any]) -> Any:
        if fn not in modules_of:
            known = (tl, tl.core)
            modules_of[fn] = frozenset(x.__name__ for x in fn.__globals__.values() if any(x is one for one in known))
        if modules_of[fn] in patched:
            return _Kept()
        patched.add(modules_of[fn])
        return patch_lang(fn)

    def launch(self: object, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            call(self, *args, **kwargs)
        finally:
            patched.clear()

    _put((patch_what_is_new, launch, replace(options, sanitize_overflow=options.debug)))
    try:
        yield
    finally:
        _put(before)


@contextmanager
def stock_interpreter() -> Iterator[None]:
    """Let it run as Triton has it."""
    before = tuple(getattr(owner, name) for owner, name in PLACES)
    _put(STOCK)
    try:
        yield
    finally:
        _put(before)


def _put(values: tuple[Any, ...]) -> None:
    for (owner, name), value in zip(PLACES, values, strict=True):
        setattr(owner, name, value)
