"""The one place that reads environment variables: where caches go, and which C compiler to take."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return kvkern's folder of that name in the user's cache (XDG_CACHE_HOME, else ~/.cache); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvkern" / name


def c_compiler() -> str | None:
    """Return the path of the C compiler ($CC, else cc, gcc or clang), or None when there is none."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)
