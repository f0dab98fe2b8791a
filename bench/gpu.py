"""One script for a GPU: bits of the exact kernels, device times, peers. `python -m bench.gpu --part P`.

Each part takes under eight minutes and appends a JSON line after every cell, so that nothing is lost when it is cut:
  bits     every output of random calls against the C reference, until 10^8 have been compared
  cells    device time of one decode layer by events and by graph replay, beside copy bandwidth and prediction
  configs  the same for one reader with a field of the launch configuration changed: which values to ship
  model    part B: bits of every operation, digests of a document, Qwen3-4B's prefill and decode under the contract
  fast     the fast profile: invariance of bits on the device, then times, for up to 256 readers
  peers    torch's sdpa by back end and flex_attention over dense keys; what is not installed is a row that says so
On a CPU with TRITON_INTERPRET=1 tiny shapes run, so that the script cannot rot. It needs the base
dependencies alone; `model` also transformers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

import kvkern
from bench import gpu_fast
from bench.gate.model import registers_on_record, seconds
from kvkern.attention import launch
from kvkern.contract import CONTRACT_ID
from kvkern.kernels import triton_door
from tests.support.views import paged_view, random_qkv, shared_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvkern.view import KVView

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
READERS = (1, 2, 4, 8)
KEYS = (3774, 32768) if IS_GPU else (70,)
SHAPE = (4, 8, 128) if IS_GPU else (1, 1, 64)
"""Query heads of a KV head, KV heads, head_dim: Qwen3-4B's layer."""
OUTPUTS = 100_000_000 if IS_GPU else 100
SECONDS = 420 if IS_GPU else 60
BUFFERS = 8 if IS_GPU else 2
ROUNDS = 200 if IS_GPU else 1
CHANGES: tuple[dict[str, int | bool], ...] = (
    {}, {"softmax_steps": 64}, {"pull": False}, {"warm": False}, {"pull": False, "warm": False}, {"softmax_passes": 1},
    {"lag": 1}, {"lag": 8}, {"output_lanes": 64}, {"score_words": 64}, {"score_rows": 2}, {"fold_runs": 8},
)  # fmt: skip


def main() -> None:
    """Run one part, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    arguments = parser.parse_args()
    for name in PARTS if arguments.part == "all" else [arguments.part]:
        for row in PARTS[name]():
            line = json.dumps({"part": name, **row, **host()})
            with arguments.out.open("a") as file:
                file.write(line + "\n")
            print(json.dumps({"part": name, **row}), flush=True)


def host() -> dict[str, Any]:
    """Say what decides the figures."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if IS_GPU else "cpu, Triton's interpreter",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "kvkern": kvkern.__version__,
        "python": platform.python_version(),
        "contract": CONTRACT_ID,
    }


def on_device(kv: KVView) -> KVView:
    """Copy a view to the device."""
    return replace(kv, **{name: x.to(DEVICE) for name, x in vars(kv).items() if isinstance(x, torch.Tensor)})


def bits() -> Iterator[dict[str, Any]]:
    """Compare outputs with the C reference, shape by shape."""
    shapes = [  # batch, group, kv_heads, head_dim, rows, columns, prefix
        (1, 4, 8, 128, 1, 3774, 3700), (8, 4, 8, 128, 1, 3774, 3700), (4, 3, 3, 64, 5, 1100, 1000),
        (2, 4, 8, 128, 64, 1300, 1023), (3, 8, 2, 96, 9, 2050, 511), (2, 2, 2, 256, 3, 600, 65),
    ] if IS_GPU else [(1, 2, 1, 64, 1, 70, 64), (2, 1, 1, 64, 2, 66, 1)]  # fmt: skip
    compared = differ = round_ = 0
    start = time.perf_counter()
    while compared < OUTPUTS and time.perf_counter() - start < SECONDS:
        batch, group, kv_heads, head_dim, rows, columns, prefix = shapes[round_ % len(shapes)]
        q, k, v = random_qkv(batch, group, kv_heads, rows, columns, head_dim, spread=1.0 + round_ % 5, seed=round_)
        k[1:, :, :prefix], v[1:, :, :prefix] = k[:1, :, :prefix], v[:1, :, :prefix]
        kv = shared_view(k, v, prefix, [rows] * batch, seed=round_, layers=2, layer=1)
        for key_run, launches in (("stock", 3), (512, 1)):  # what waits for nobody comes first
            expected = kvkern.prefix_attention(q, kv, key_run=key_run, backend="c")
            with configured(launches=launches):
                ours = kvkern.prefix_attention(q.to(DEVICE), on_device(kv), key_run=key_run, backend="triton").cpu()
            differ += int((ours.view(torch.int16) != expected.view(torch.int16)).sum())
            compared += ours.numel()
        round_ += 1
        yield {"compared": compared, "differ": differ, "rounds": round_}
    if not differ and compared >= OUTPUTS:
        yield {"verdict": "equal", "compared": compared, "differ": 0}
    else:
        yield {"verdict": "DIFFERENT" if differ else "cut off", "compared": compared, "differ": differ}


def cells() -> Iterator[dict[str, Any]]:
    """Time one decode layer, bits first."""
    copied = copy_bandwidth()
    yield {"cell": "copy", "gbps": copied / 1e9}
    for launches in (3, 1):  # what waits for nobody comes first
        for keys in KEYS:
            for readers in READERS if IS_GPU else READERS[:2]:
                name = "exact" if launches == 1 else f"exact-in-{launches}"
                yield cell(name, readers, keys, {"launches": launches}, copied)


def configs() -> Iterator[dict[str, Any]]:
    """Time one reader with one field after another changed, bits first."""
    copied = copy_bandwidth()
    for changes in CHANGES if IS_GPU else CHANGES[:2]:
        for keys in KEYS:
            name = "exact" + "".join(f"-{field}={value}" for field, value in changes.items())
            yield cell(name, 1, keys, {"launches": 1, **changes}, copied)


def cell(name: str, readers: int, keys: int, changes: dict[str, int | bool], copied: float) -> dict[str, Any]:
    """Check and time one decode layer with a changed launch configuration."""
    with configured(**changes):
        return _cell(name, readers, keys, copied)


def _cell(name: str, readers: int, keys: int, copied: float) -> dict[str, Any]:
    layers = [decode_layer(readers, keys, seed) for seed in range(BUFFERS)]
    differ = bits_of(*layers[0])
    moved = kvkern.resolve(layers[0][0].to(DEVICE), on_device(layers[0][1]), backend="triton").bytes_moved
    calls = [call(q.to(DEVICE), on_device(kv)) for q, kv in layers]
    config = triton_door.config_for(DEVICE)
    predicted = seconds(readers, keys, config, registers_on_record(triton.__version__))
    event_s, graph_s = by_events(calls), by_graph(calls)
    best = graph_s or event_s
    # What the last replay has left, in work space that all calls have used.
    expected = kvkern.prefix_attention(*layers[0], backend="c")
    differ += int((calls[0]().cpu().view(torch.int16) != expected.view(torch.int16)).sum())
    return {
        "cell": f"{name}-B{readers}-P{keys}", "differ": differ, "bytes_moved": moved,
        "flops": 4 * layers[0][0].numel() * (keys + 1), "event_us": event_s * 1e6,
        "graph_us": graph_s and graph_s * 1e6, "predicted_us": predicted * 1e6, "gbps": moved / best / 1e9,
        "percent_of_copy": 100 * moved / best / copied, "launches": config.launches,
    }  # fmt: skip


@contextmanager
def configured(**changes: int | bool) -> Iterator[None]:
    """Run exact calls with a launch configuration that is changed."""
    config_for = triton_door.config_for
    triton_door.config_for = lambda device: replace(config_for(device), **changes)
    try:
        yield
    finally:
        triton_door.config_for = config_for


def fast() -> Iterator[dict[str, Any]]:
    """Check and time the fast profile."""

    def layer(readers: int, keys: int, seed: int) -> tuple[torch.Tensor, KVView]:
        group, kv_heads, head_dim = SHAPE
        k, v = random_qkv(1, group, kv_heads, 1, keys + 1, head_dim, seed=seed)[1:]
        q = random_qkv(readers, group, kv_heads, 1, 1, head_dim, seed=seed)[0]
        own = [(k[0, :, keys:], v[0, :, keys:])] * readers  # a crowd's keys, expanded, would not fit the host
        kv = paged_view([(k[0, :, :keys], v[0, :, :keys])], [0] * readers, own, [1] * readers, seed=seed)
        return q.to(DEVICE), on_device(kv)

    readers = (1, 8, 64, 256) if IS_GPU else (1, 2)
    yield from gpu_fast.rows(gpu_fast.Rig(layer, by_events, by_graph, readers, KEYS, BUFFERS), copy_bandwidth())


def model() -> Iterator[dict[str, Any]]:
    """Check and time the whole model under the contract."""
    from bench import gpu_model

    yield from gpu_model.rows(DEVICE, by_events)


def peers() -> Iterator[dict[str, Any]]:
    """Time what others have."""
    from bench import gpu_peers

    cells = [(readers, keys) for keys in KEYS for readers in (READERS if IS_GPU else READERS[:1])]
    yield from gpu_peers.rows(DEVICE, by_events, cells, SHAPE, BUFFERS)


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "bits": bits,
    "cells": cells,
    "configs": configs,
    "model": model,
    "fast": fast,
    "peers": peers,
}


def decode_layer(readers: int, keys: int, seed: int) -> tuple[torch.Tensor, KVView]:
    """Return q and a view of one decode step; Qwen3-4B's layer on a GPU."""
    group, kv_heads, head_dim = SHAPE
    q, k, v = random_qkv(1, group, kv_heads, 1, keys + 1, head_dim, seed=seed)
    q, k, v = (x.expand(readers, -1, -1, -1).contiguous() for x in (q, k, v))
    return q, shared_view(k, v, keys, [1] * readers, seed=seed)


def bits_of(q: torch.Tensor, kv: KVView) -> int:
    """Count differing outputs of a layer."""
    ours = kvkern.prefix_attention(q.to(DEVICE), on_device(kv), backend="triton").cpu()
    return int((ours.view(torch.int16) != kvkern.prefix_attention(q, kv, backend="c").view(torch.int16)).sum())


def call(q: torch.Tensor, kv: KVView) -> Callable[[], torch.Tensor]:
    """Return the hot path: no validation, an output and work space that are there already."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    workspace = kvkern.new_workspace(q, kv, backend="triton")

    def run() -> torch.Tensor:
        launch(q, kv, out, None, backend="triton", workspace=workspace)
        return out

    return run


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.rand(1 << (28 if IS_GPU else 16), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / by_events([lambda: target.copy_(source)])


def by_events(calls: list[Callable[[], object]]) -> float:
    """Median seconds of a call by CUDA events, buffers rotated; by the clock without a GPU."""
    for run in calls:
        run()
    times = []
    for round_ in range(ROUNDS):
        run = calls[round_ % len(calls)]
        if IS_GPU:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def by_graph(calls: list[Callable[[], object]]) -> float | None:
    """Median seconds of a call inside a graph of all rotated buffers; None without a GPU."""
    if not IS_GPU:
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in calls:
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for run in calls:
            run()
    return by_events([graph.replay]) / len(calls)


if __name__ == "__main__":
    main()
