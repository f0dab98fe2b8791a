"""The allow-list of the numeric contract: what an exact kernel's code may hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gate.compiler import Compiled

_OPCODE = re.compile(r"^\s*(?:@%?!?\w+\s+)?([a-z][a-z0-9_]*(?:\.[a-z0-9_:]+)*)\s", re.MULTILINE)
# fp32 arithmetic that PTX may name; anything else that touches f16, bf16, f32 or f64 is refused.
_ALLOWED_PTX = (
    "add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.rn.f32", "sqrt.rn.f32", "max.f32", "min.f32",
    "neg.f32", "abs.f32", "cvt.rzi.s32.f32", "cvt.rn.f32.s32", "fma.rn.f32x2", "add.rn.f32x2", "mul.rn.f32x2",
    "sub.rn.f32x2",
)  # fmt: skip
_FORBIDDEN_PTX = ("approx", ".ftz", "div.full", "mma", "tcgen05", "ex2", "lg2", "rcp", "rsqrt", "sin.", "cos.", "tanh")
_FLAGS = ("fast", "contract", "reassoc", "afn", "arcp", "nsz")  # nnan and ninf are facts that LLVM infers
_HINTS = 1
"""Waits that read nothing afterwards: an output program holds its V back until K has been read."""
_TICKETS = 1
"""Atomics that order nothing: whoever draws a ticket reads nothing that others have stored."""
_FDIV_FMAS = 5
"""Fused multiply-adds that AMD's expansion of one IEEE division holds."""
_FSQRT_FMAS = 2
"""The same of one IEEE square root: `v_sqrt_f32`, then both neighbours are tried. Triton 3.6 writes a root out itself,
from `llvm.amdgcn.rsq` by five fmas of the source: IEEE above 2^-96, where RMSNorm's eps keeps it."""


def violations(compiled: Compiled) -> list[str]:
    """Name everything in an exact kernel that could change a bit."""
    return _in_ptx(compiled.asm) if "ptx" in compiled.asm else _in_amd(compiled.asm)


def _in_ptx(asm: dict[str, str]) -> list[str]:
    found = []
    opcodes = _OPCODE.findall(asm["ptx"])
    for opcode in sorted(set(opcodes)):
        words = opcode.split(".")
        is_float = any(word in ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64", "tf32") for word in words)
        compares = words[0] in ("setp", "set")
        moves = words[0] in ("ld", "st", "mov", "shfl", "selp")
        if any(bad in opcode for bad in _FORBIDDEN_PTX):
            found.append(f"{opcode}: forbidden")
        elif is_float and not compares and not moves and opcode not in _ALLOWED_PTX:
            found.append(f"{opcode}: not on the allow-list")
    return found + fused_without_being_asked(asm) + unordered(asm["ptx"])


def unordered(ptx: str) -> list[str]:
    """Name what in NVIDIA code would let a program read what another has not stored yet.

    A wait is a load that is looked at again and again, by the rule `ld.volatile` or `ld.relaxed`, then `ld.acquire` of
    the same address. An arrival is an `atom` that releases and acquires; tickets alone order nothing.
    """
    found = []
    for operation in sorted(set(re.findall(r"\b(?:ld|atom|red|fence)\.[\w.:]*(?:acq|rel)[\w.:]*", ptx))):
        if not re.search(r"\.(?:gpu|sys)\b", operation):
            found.append(f"{operation}: orders nothing between programs")
    acquired = set(re.findall(r"\bld\.acquire\.gpu[\w.]*\s+\S+,\s*\[\s*(%\w+)", ptx))
    polled = re.findall(r"\bld\.(?:volatile|relaxed)[\w.]*\s+(?:\{[^}]*\}|\S+),\s*\[\s*(%\w+)", ptx)
    if sum(address not in acquired for address in polled) > _HINTS:
        found.append("a wait without an acquire")
    atomics = re.findall(r"\b(?:atom|red)\.[\w.]+", ptx)
    arrivals = sum(".acq_rel" in atomic for atomic in atomics)
    if len(atomics) - arrivals > _TICKETS:
        found.append("an arrival that does not release and acquire")
    if acquired and not arrivals:
        found.append("a wait for nobody that releases")
    return found


def fused_without_being_asked(asm: dict[str, str]) -> list[str]:
    """Compare fused multiply-adds of NVIDIA's code with those of the source; AMD's are counted with its divisions."""
    if "ptx" not in asm:
        return []
    opcodes = _OPCODE.findall(asm["ptx"])
    asked = sum(int(width or 1) for width in re.findall(r"call [^\n]*@llvm\.fma\.(?:v(\d+))?f32\(", asm["llir"]))
    made = opcodes.count("fma.rn.f32") + 2 * opcodes.count("fma.rn.f32x2")
    return [] if made == asked else [f"fma.rn.f32: {made} in the code, {asked} in the source"]


def _in_amd(asm: dict[str, str]) -> list[str]:
    llir, code = asm["llir"], asm["amdgcn"]
    found = [f"{flag}: a fast-math flag" for flag in _FLAGS if re.search(rf"= (?:f\w+|call) (?:\w+ )*{flag} ", llir)]
    modes = set(re.findall(r'"denormal-fp-math(?:-f32)?"="([^"]*)"', llir))
    if modes - {"ieee", "ieee,ieee"}:
        found.append(f"denormal mode: {sorted(modes)}, IEEE is required")
    asked = len(re.findall(r"call [^\n]*@llvm\.fma\.(?:v\d+)?f32\(", llir))
    divisions = len(re.findall(r"\bfdiv\b", llir))
    roots = len(re.findall(r"call [^\n]*@llvm\.sqrt\.f32\(", llir))
    made = len(re.findall(r"^\s+v_(?:pk_)?fma(?:c|mk|ak)?_f32", code, re.MULTILINE))
    if made != asked + _FDIV_FMAS * divisions + _FSQRT_FMAS * roots:
        found.append(
            f"fma: {made} in the code, {asked} in the source, {divisions} divisions of {_FDIV_FMAS}, {roots} square "
            f"roots of {_FSQRT_FMAS}"
        )
    own_roots = len(re.findall(r"call [^\n]*@llvm\.amdgcn\.rsq\.f32\(", llir))
    if len(re.findall(r"^\s+v_rsq", code, re.MULTILINE)) != own_roots:
        found.append(f"v_rsq: more than the {own_roots} in the source")
    found += [f"{op}: forbidden" for op in sorted(set(re.findall(r"v_(?:exp|log|rcp|sin|cos|mfma)\w*", code)))
              if not (op.startswith("v_rcp") and divisions)]  # fmt: skip
    return found
