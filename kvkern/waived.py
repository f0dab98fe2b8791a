"""Models of this process that compute through kvkern although their own eager attention has other bits."""

from __future__ import annotations

import weakref
from typing import Any

_WAIVED: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def waive(model: Any, difference: str) -> None:
    """Remember a model that was patched with `allow_other_bits`, and how its own eager attention differs."""
    _WAIVED[model] = difference


def withdraw(model: Any) -> None:
    """Forget a model: it is unpatched."""
    _WAIVED.pop(model, None)


def waived() -> list[str]:
    """Return the differences of the models that are patched now, each once."""
    return sorted(set(_WAIVED.values()))
