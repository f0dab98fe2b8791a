"""Named shapes, and how many layers it takes to outrun the last-level cache."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

PREFIX_TOKENS = 3774
"""The document of arXiv 2606.13361."""
SHORT_TOKENS = 900
READERS = (1, 2, 8, 32)


@dataclass(frozen=True)
class LayerShape:
    """One attention layer and the prefix that it reads; a reader adds one token."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    prefix_len: int = PREFIX_TOKENS

    @property
    def kv_bytes(self) -> int:
        """Bytes of the prefix's K and V in bf16."""
        return 2 * 2 * self.num_kv_heads * self.head_dim * self.prefix_len

    @property
    def layers(self) -> int:
        """Layers to rotate through, so that three times the last-level cache lies between two uses of one."""
        return max(2, -(-3 * last_level_cache_bytes() // self.kv_bytes))

    def spelled(self, batch: int = 1) -> str:
        """Spell the shape of a decode call, the reader's own token included."""
        heads = f"Q{self.num_q_heads}-KV{self.num_kv_heads}-D{self.head_dim}"
        return f"B{batch}-{heads}-P{self.prefix_len}+1"

    def __str__(self) -> str:
        return self.name


QWEN3_4B = LayerShape("qwen3-4b", 32, 8, 128)
SMOLLM2 = LayerShape("smollm2-135m", 9, 3, 64)


@functools.cache
def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0, or 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def cpu_model() -> str:
    """Name the CPU with its family and model numbers, as Linux lists them."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return os.uname().machine
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info, re.MULTILINE))
    return f"{fields.get('model name', '?')} (family {fields.get('cpu family')}, model {fields.get('model')})"
