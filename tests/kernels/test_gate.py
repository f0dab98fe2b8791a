"""The compile gate catches what it is for: faults are put into kernels on purpose. Triton's compiler needs no GPU."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import kvkern
from kvkern import operations
from kvkern.kernels import ops
from kvkern.tables import RopeTable
from kvkern.view import KVView
from tests.support.interpreter import needs_interpreter
from tests.support.views import int32, random_qkv

CHECKOUT = Path(kvkern.__file__).parents[1]
CAUGHT = {
    "sm90: approximate exp": "ex2.approx",
    "sm90: division that is not IEEE": "div.full",
    "sm90: fused multiply-add": "fma.rn.f32",
    "sm90: tensor core": "mma",
    "sm90: barrier in a loop": "barriers inside loops",
    "sm90: spill": "spills",
    "sm90: fast, no tensor core": "products: 0 wgmma.mma_async",
    "sm90: fast, shallow pipeline": "depth: 2 tiles of K and V in shared memory, 3 are configured",
    "sm90: fast, spill": "spills",
    "sm90: fast, fused multiply-add": "fma.rn.f32",
    "sm90: fast, one program a multiprocessor": "occupancy: 1 programs fit",
    "gfx942: approximate exp": "v_exp",
    "gfx942: fused multiply-add": "fma",
    "gfx942: barrier in a loop": "barriers inside loops",
}


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.broken_kernels"]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", CAUGHT)
def test_gate__catches(said: dict[str, list[str]], fault: str) -> None:
    assert any(CAUGHT[fault] in problem for problem in said[fault]), said[fault]


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_gate__lets_a_sound_kernel_pass(said: dict[str, list[str]], target: str) -> None:
    assert said[f"{target}: sound"] == []


def test_gate__lets_the_fast_kernel_pass(said: dict[str, list[str]]) -> None:
    assert said["sm90: fast, sound"] == []


def test_gate__notices_units_that_are_laid_out_unlike() -> None:
    from bench.gate.__main__ import unlike

    alike = [("sm90", f"fast/G4-D128-U{unit}", {}, [], ("a", "b")) for unit in (256, 1024)]
    other = ("sm90", "fast/G4-D128-U4096", {}, [], ("a", "c"))
    elsewhere = ("sm80", "fast/G4-D128-U256", {}, [], ("c",))
    assert unlike([*alike, elsewhere]) == []
    assert unlike([*alike, other]) == ["sm90 fast/G4-D128-U4096: laid out unlike another unit, whose bits it must have"]


def test_gate__notices_figures_that_get_worse() -> None:
    from bench.gate.__main__ import worse

    record = {"registers": 64, "in_flight_bytes": 4096}
    assert worse({"registers": 64, "in_flight_bytes": 4096}, record) == []
    assert worse({"registers": 60, "in_flight_bytes": 5000}, record) == []
    assert worse({"registers": 65, "in_flight_bytes": 4095}, record) == [
        "registers is 65, on record is 64",
        "in_flight_bytes is 4095, on record is 4096",
    ]


POLL = "ld.volatile.global.b32 { %r1 }, [ %rd1 + 0 ];"
HINT = "ld.volatile.global.b32 { %r1 }, [ %rd7 + 0 ];"
ACQUIRE = "ld.acquire.gpu.global.b32 %r2, [%rd1];"
ARRIVAL = "@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [ %rd1 + 0 ], 1;"
TICKET = "@%p1 atom.global.gpu.relaxed.add.u32 %r4, [ %rd2 + 0 ], 1;"
SOUND = (TICKET, HINT, POLL, ACQUIRE, ARRIVAL)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param((TICKET, HINT, POLL, ARRIVAL), id="no acquire"),
        pytest.param((*SOUND, HINT), id="two waits that are not acquired"),
        pytest.param((HINT, POLL, POLL.replace("%rd1 ", "%rd3 "), ACQUIRE, ARRIVAL), id="another counter is acquired"),
        pytest.param((HINT, POLL.replace("volatile", "relaxed.gpu"), ARRIVAL), id="a relaxed wait"),
        pytest.param((*SOUND, ARRIVAL.replace("acq_rel", "relaxed")), id="an arrival that orders nothing"),
        pytest.param((*SOUND, ARRIVAL.replace("atom", "red").replace("acq_rel", "relaxed")), id="the same, no result"),
        pytest.param((*SOUND, ARRIVAL.replace("gpu.", "cta.")), id="an arrival for its own program"),
        pytest.param((TICKET, POLL, ACQUIRE.replace("gpu", "cta"), ARRIVAL), id="an acquire from its own program"),
        pytest.param((POLL, ACQUIRE), id="nobody arrives"),
    ],
)
def test_gate__waits_and_arrivals_are_ordered(code: tuple[str, ...]) -> None:
    from bench.gate.rules import unordered

    assert unordered("\n".join(SOUND)) == [] == unordered(ARRIVAL)
    assert unordered("\n".join(code))


def test_predictions__are_those_of_the_shipped_configuration() -> None:
    from bench.gate.model import PAGE, page, registers_on_record
    from kvkern.kernels.launch_config import exact_config

    assert PAGE.read_text() == page(exact_config("sm90"), registers_on_record())


def test_gpu_script__runs_in_the_interpreter(tmp_path: Path) -> None:
    """The script for a GPU cannot rot: all parts, tiny shapes, and every line that it writes."""
    out = tmp_path / "gpu.jsonl"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out)]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in rows if "verdict" in row] == ["equal"]
    exact = [row for row in rows if row.get("cell", "").startswith("exact")]
    assert [row["launches"] for row in exact] == [3, 3, 1, 1, 1, 1] and all(row["differ"] == 0 for row in exact)
    assert [row["cell"] for row in exact][-1] == "exact-softmax_steps=64-B1-P70"
    fast = [row for row in rows if row["part"] == "fast"]
    assert len(fast) == 4 and [row["differ"] for row in fast if "differ" in row] == [0, 0]
    model = [row for row in rows if row["part"] == "model"]
    assert len(model) == 6 and all(row["differ"] == 0 for row in model)
    assert {row["device"] for row in rows} == {"cpu, Triton's interpreter"}
    peers = {row["cell"]: row for row in rows if row["part"] == "peers"}
    assert {name for name, row in peers.items() if "event_us" in row} >= {"sdpa-MATH-B1-P70", "flex_attention-B1-P70"}
    assert "absent" in peers["flashinfer"]


LAUNCHED = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32",
            torch.bfloat16: "*bf16", int: "i32", float: "fp32"}  # fmt: skip
SAME = [("i32", "i64"), ("*i16", "*bf16")]
"""A number that is annotated int64; bf16, which the interpreter does not have."""


@needs_interpreter
def test_gate__compiles_the_types_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is launched with a bool, or over words of another type, is another one than the gate's."""
    from bench.gate.cases import exact_cases
    from bench.gate.compiler import signature
    from bench.gate.fast_cases import fast_cases

    compiled = {case.kernel: case for case in (*exact_cases("sm90"), *fast_cases("sm90"))}
    launched: dict[object, dict[str, object]] = {}
    for kernel in compiled:

        def noted(*given: object, kernel=kernel, run=kernel.run, **options: object) -> object:
            names = inspect.signature(kernel.fn).parameters
            own = {name: value for name, value in options.items() if name in names}
            launched.setdefault(kernel, inspect.getcallargs(kernel.fn, *given, **own))
            return run(*given, **options)

        monkeypatch.setattr(kernel, "run", noted)
    _launch_all()
    assert launched.keys() == compiled.keys()
    for kernel, arguments in launched.items():
        case = replace(compiled[kernel], kernel=triton.JITFunction(kernel.fn))
        for name, expected in signature(case).items():
            if expected != "constexpr":
                value = arguments[name]
                given = LAUNCHED[value.dtype if isinstance(value, torch.Tensor) else type(value)]
                assert given == expected or (given, expected) in SAME, (case.name, name, given, expected)


def _launch_all() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 20, 64)
    kv = KVView.from_dense(k, v)
    for profile in ("exact", "fast"):
        with np.errstate(invalid="ignore"):  # what lies past the last key may be anything
            kvkern.prefix_attention(q, kv, profile=profile, backend="triton", return_lse=True)
    ops.append(k, v, kv.suffix_k, kv.suffix_v, int32(0), int32(20))
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    for rows in (1, 40):
        operations.linear(x[:rows], weight, path="triton")
    operations.rms_norm(x, weight[0], 1e-6, path="triton")
    operations.silu_times(x, x, path="triton")
    table = RopeTable(*torch.randn(2, 300, 32).bfloat16())
    operations.rotary(q, torch.zeros(1, 1, dtype=torch.int64), table, path="triton")
