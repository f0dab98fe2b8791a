"""kvkern: compute a document's KV cache once, publish it, and let any number of readers attend to it in place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkern.attention import Plan, new_workspace, prefix_attention, resolve
    from kvkern.auditing import Audit, audit
    from kvkern.errors import (
        AccessError,
        IntegrityError,
        KvkernError,
        KVMismatchError,
        LayoutError,
        SpecMismatchError,
        UnsupportedError,
    )
    from kvkern.layout import Collected, Explanation, Published, Report, Summary
    from kvkern.model_patch.recompute import Recomputed
    from kvkern.model_patch.register import patch, unpatch
    from kvkern.model_patch.store import Prefix, Store
    from kvkern.spec import KVSpec
    from kvkern.view import KVView

__version__ = "0.1.0"

_HOMES = {
    "AccessError": "errors",
    "Audit": "auditing",
    "Collected": "layout",
    "Explanation": "layout",
    "IntegrityError": "errors",
    "KVMismatchError": "errors",
    "KVSpec": "spec",
    "KVView": "view",
    "KvkernError": "errors",
    "LayoutError": "errors",
    "Plan": "attention",
    "Prefix": "model_patch.store",
    "Published": "layout",
    "Recomputed": "model_patch.recompute",
    "Report": "layout",
    "SpecMismatchError": "errors",
    "Summary": "layout",
    "Store": "model_patch.store",
    "UnsupportedError": "errors",
    "audit": "auditing",
    "new_workspace": "attention",
    "patch": "model_patch.register",
    "prefix_attention": "attention",
    "resolve": "attention",
    "unpatch": "model_patch.register",
}

__all__ = [
    "AccessError",
    "Audit",
    "Collected",
    "Explanation",
    "IntegrityError",
    "KVMismatchError",
    "KVSpec",
    "KVView",
    "KvkernError",
    "LayoutError",
    "Plan",
    "Prefix",
    "Published",
    "Recomputed",
    "Report",
    "SpecMismatchError",
    "Store",
    "Summary",
    "UnsupportedError",
    "audit",
    "new_workspace",
    "patch",
    "prefix_attention",
    "resolve",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import kvkern` loads neither transformers nor triton."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvkern' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kvkern.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
