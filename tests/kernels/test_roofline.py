"""What the roofline reads out of the benchmarks' JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is in kvkern[bench]")

from bench import roofline


def test_points__of_the_kept_cpu_results() -> None:
    points, bytes_a_second = roofline.cpu_points(
        json.loads(sorted(roofline.RESULTS.glob("*-cpu.json"))[-1].read_text())
    )
    ours = {p.readers: p for p in points if p.peer == "kvkern"}
    assert set(ours) == {1, 2, 8, 32} and {p.peer for p in points} == {"kvkern", "eager", "sdpa"}
    assert ours[8].flops == 8 * ours[1].flops == 8 * 4 * 32 * 128 * 3775
    assert ours[8].intensity > 7.5 * ours[1].intensity, "readers share the prefix's bytes"
    for p in ours.values():
        assert p.gflops < p.intensity * bytes_a_second / 1e9, "a call of cold data lies under the roof"


def test_points__of_a_gpu(tmp_path: Path) -> None:
    rate = {"gbps": 100.0, "percent_of_copy": 3.125}
    cell = {"bytes_moved": 10**6, "flops": 4 * 10**6, "event_us": 10.0, "graph_us": None, **rate}
    rows = [
        {"cell": "copy", "gbps": 3200.0},
        {"cell": "fast-bits-B8-P3774", "differ": 0},
        {"cell": "fast-B8-P3774", **cell, "graph_us": 8.0},
        {"cell": "exact-B8-P3774", **cell},
    ]
    points, bytes_a_second = roofline.gpu_points(rows)
    assert [(p.peer, p.readers, p.seconds) for p in points] == [("fast", 8, 8e-6), ("exact", 8, 1e-5)]
    assert bytes_a_second == 3.2e12 and points[0].intensity == 4
    roofline.draw(points, bytes_a_second, "some GPU", "copy", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
