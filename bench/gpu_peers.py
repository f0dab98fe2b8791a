"""Other libraries' attention on the shapes of `bench.gpu`: another arithmetic, so no bits are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from tests.support.views import random_qkv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
PACKAGES = ("flashinfer", "flash_attn")
Attention = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]"


def rows(
    device: torch.device, by_events: Callable[[list[Callable[[], object]]], float], cells: list[tuple[int, int]],
    shape: tuple[int, int, int], buffers: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Time torch's attention by back end over dense keys that are repeated for each reader.

    Args:
        device: where.
        by_events: median seconds of a call among rotated ones.
        cells: readers and keys.
        shape: query heads of a KV head, KV heads, head_dim.
        buffers: to rotate.
    """
    for readers, keys in cells:
        layers = [_layer(device, readers, keys, shape, seed) for seed in range(buffers)]
        for name, attend in _attentions(device).items():
            cell = {"cell": f"{name}-B{readers}-P{keys}"}
            try:
                seconds = by_events([_call(attend, *layer) for layer in layers])
            except (RuntimeError, NotImplementedError) as error:
                yield {**cell, "absent": str(error).splitlines()[0][:120]}
            else:
                yield {**cell, "event_us": seconds * 1e6}
    for package in PACKAGES:
        try:
            __import__(package)
        except ImportError:
            yield {"cell": package, "absent": "not installed"}
        else:
            yield {"cell": package, "absent": "installed, but not measured by this version"}


def _attentions(device: torch.device) -> dict[str, Attention]:
    def sdpa(backend: SDPBackend) -> Attention:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return attend

    # Without a compiler it is a reference, of which nobody claims speed.
    flex = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    named = {f"sdpa-{name}": sdpa(getattr(SDPBackend, name)) for name in BACKENDS}
    return {**named, "flex_attention": lambda q, k, v: flex(q, k, v, enable_gqa=True)}


def _layer(
    device: torch.device, readers: int, keys: int, shape: tuple[int, int, int], seed: int
) -> tuple[torch.Tensor, ...]:
    group, kv_heads, head_dim = shape
    dense = random_qkv(1, group, kv_heads, 1, keys + 1, head_dim, seed=seed)
    return tuple(x.to(device).expand(readers, -1, -1, -1).contiguous() for x in dense)


def _call(attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        return attend(q, k, v)

    run()
    return run
