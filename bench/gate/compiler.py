"""Compile a Triton kernel for a GPU that is not there, and keep everything that the compiler says about it."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTEE = {
    "table": "i64",
    "e": "fp32",
    "partial": "fp32",
    "lse": "fp32",
    "out": "i16",
    "k": "i16",
    "v": "i16",
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time arguments.

    Attributes:
        name: what the table calls it.
        kernel: a `triton.jit` function.
        constants: its constexpr arguments.
        num_warps: warps of a program.
        pointee: types behind pointers, by argument name, where they differ from the usual ones.
        options: further compile options.
        profile: `exact`: the contract's allow-list holds; `fast`: tensor cores are required.
        aligned: integer arguments that are multiples of 16.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    pointee: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    profile: str = "exact"
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What came out: Triton's stages as text, and for CUDA the disassembly and the resource line."""

    case: Case
    target: str
    asm: dict[str, Any]
    shared_bytes: int
    sass: str = ""
    resources: str = ""


def signature(case: Case) -> dict[str, str]:
    """Type every argument: pointers by name, `tl.int64` by annotation, the rest i32, scales fp32."""
    types = {}
    for parameter in case.kernel.params:
        name = parameter.name
        if name in case.constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            short = name.removesuffix("_ptr")
            types[name] = "*" + case.pointee.get(name, _POINTEE.get(short, "i32"))
        elif "int64" in str(parameter.annotation) or "i64" in str(parameter.annotation):
            types[name] = "i64"
        else:
            types[name] = "fp32" if name == "eps" or name.endswith("scale") else "i32"
    return types


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for a target; needs neither a GPU nor a driver."""
    names = [parameter.name for parameter in case.kernel.params]
    multiples = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in case.aligned]
    aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
    source = ASTSource(fn=case.kernel, signature=signature(case), constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": False, **case.options}
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    asm = dict(kernel.asm.items()) if hasattr(kernel.asm, "items") else kernel.asm
    if "cubin" not in asm:
        return Compiled(case, target, asm, kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
    return Compiled(case, target, asm, kernel.metadata.shared, sass, resources)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout
