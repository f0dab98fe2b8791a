"""The part `fast` of bench/gpu.py: invariance of bits on the device, distance from exact, time of a decode layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import kvkern
from kvkern.attention import launch
from kvkern.kernels import fast_door
from kvkern.kernels.fast_cost import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvkern.view import KVView

    Timer = Callable[[list[Callable[[], object]]], float | None]


@dataclass(frozen=True)
class Rig:
    """What bench/gpu.py lends.

    Attributes:
        layer: makes q and a view on the device from readers, keys and a seed.
        by_events: median seconds of a call by events.
        by_graph: median seconds of a call inside a graph; None without a GPU.
        readers: readers of one prefix, per cell.
        keys: tokens of the prefix, per cell.
        buffers: layers to rotate through.
    """

    layer: Callable[[int, int, int], tuple[torch.Tensor, KVView]]
    by_events: Timer
    by_graph: Timer
    readers: tuple[int, ...]
    keys: tuple[int, ...]
    buffers: int


def rows(rig: Rig, copied: float) -> Iterator[dict[str, Any]]:
    """Yield one row of bits and one of times for each cell."""
    for keys in rig.keys:
        for readers in rig.readers:
            layers = [rig.layer(readers, keys, seed) for seed in range(rig.buffers)]
            yield {"cell": f"fast-bits-B{readers}-P{keys}", **bits(*layers[0])}
            q, kv = layers[0]
            made = fast_door.plan_for(q, kv.block_table, kv.block_tiles, kv.suffix_k)
            workspace = kvkern.new_workspace(q, kv, profile="fast")
            calls = [_call(*layer, workspace) for layer in layers]
            event_s, graph_s = rig.by_events(calls), rig.by_graph(calls)
            moved = kvkern.resolve(q, kv, profile="fast").bytes_moved
            best = graph_s or event_s
            predicted = seconds(made, fast_door.config_for(q.device), keys, int(kv.suffix_len[0]))
            yield {
                "cell": f"fast-B{readers}-P{keys}", "unit": made.unit_tokens, "programs": made.programs,
                "bytes_moved": moved, "flops": 4 * q.numel() * (keys + 1),
                "event_us": event_s * 1e6, "graph_us": graph_s and graph_s * 1e6,
                "predicted_us": predicted * 1e6, "gbps": moved / best / 1e9,
                "percent_of_copy": 100 * moved / best / copied, "launches": fast_door.LAUNCHES,
            }  # fmt: skip


def bits(q: torch.Tensor, kv: KVView) -> dict[str, Any]:
    """Count outputs that differ alone, reversed, repeated, and with other units; and compare with the exact profile."""
    expected = kvkern.prefix_attention(q, kv, profile="fast")
    readers = q.shape[0]
    order = list(range(readers))[::-1]
    alone = [kvkern.prefix_attention(q[b : b + 1], _only(kv, [b]), profile="fast") for b in {0, readers - 1}]
    found = {
        "alone": sum(map(_differ, alone, [expected[b : b + 1] for b in {0, readers - 1}])),
        "reversed": _differ(kvkern.prefix_attention(q[order], _only(kv, order), profile="fast"), expected[order]),
        "repeated": sum(_differ(kvkern.prefix_attention(q, kv, profile="fast"), expected) for _ in range(3)),
        "units": _other_units(q, kv, expected),
    }
    exact = kvkern.prefix_attention(q, kv, backend="triton").float()
    return {"differ": sum(found.values()), **found, "most_from_exact": float((expected.float() - exact).abs().max())}


def _other_units(q: torch.Tensor, kv: KVView, expected: torch.Tensor) -> int:
    shipped, config = fast_door.config_for, fast_door.config_for(q.device)
    differ = 0
    try:
        for unit in config.units(q.shape[3]):
            one = replace(config, units_d64=(unit,), units_d128=(unit,))
            fast_door.config_for = lambda device, one=one: one
            differ += _differ(kvkern.prefix_attention(q, kv, profile="fast"), expected)
    finally:
        fast_door.config_for = shipped
    return differ


def _only(kv: KVView, readers: list[int]) -> KVView:
    """Return a view of some readers, in an order."""
    names = ("reader_prefix", "suffix_k", "suffix_v", "suffix_len", "query_len")
    return replace(kv, **{name: getattr(kv, name)[readers].contiguous() for name in names})


def _differ(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.contiguous().view(torch.int16) != b.contiguous().view(torch.int16)).sum())


def _call(q: torch.Tensor, kv: KVView, workspace: torch.Tensor) -> Callable[[], object]:
    """Return the hot path: no validation, output and work space there already."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    return lambda: launch(q, kv, out, None, profile="fast", workspace=workspace)
