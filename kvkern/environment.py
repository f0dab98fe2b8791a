"""The one place that looks at the host: where caches go, which C compiler to take, what the CPU can do."""

from __future__ import annotations

import functools
import os
import re
import shutil
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return kvkern's folder of that name in the user's cache (XDG_CACHE_HOME, else ~/.cache); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvkern" / name


def c_compiler() -> str | None:
    """Return the path of the C compiler ($CC, else cc, gcc or clang), or None when there is none."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)


@functools.cache
def cpu_isa() -> str:
    """Name the widest bf16 instruction set of this CPU, which decides stock's order of sums."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split())
    except (OSError, AttributeError):
        return "cpu"
    for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"):
        if flag in flags:
            return flag
    return "cpu"
