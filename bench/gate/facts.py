"""Facts of a compiled kernel, read from its code: registers, spills, barriers in loops, loads, bytes in flight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.gate.compiler import Compiled

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Facts:
    """What the gate watches.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; more than 0 means spills or local arrays.
        spills: instructions that write or read local memory.
        shared_bytes: per program.
        loop_barriers: barriers inside loops.
        loads: global loads, as instructions.
        fmas: fused multiply-adds, as instructions.
        in_flight_bytes: most bytes that a warp has asked for before it waits for the first of them; every thread's
            own are counted, also where several threads ask for one address.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    loop_barriers: int
    loads: int
    fmas: int
    in_flight_bytes: int


def facts_of(compiled: Compiled) -> Facts:
    """Read the facts out of SASS, or out of AMD's assembly."""
    return _from_sass(compiled) if compiled.sass else _from_amdgcn(compiled)


def _from_sass(compiled: Compiled) -> Facts:
    code = list(_instructions(compiled.sass))
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", compiled.resources)}
    opcodes = [opcode for _, opcode, _ in code]
    return Facts(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spills=sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in opcodes),
        shared_bytes=compiled.shared_bytes,
        loop_barriers=_on_cycles([i for i, op in enumerate(opcodes) if op.startswith("BAR")], _sass_edges(code)),
        loads=sum(opcode.startswith("LDG") for opcode in opcodes),
        fmas=sum(opcode.startswith("FFMA") for opcode in opcodes),
        in_flight_bytes=32 * _in_flight(code),
    )


def _instructions(sass: str) -> Iterator[tuple[str, str, str]]:
    """Yield (label before it or "", opcode, operands behind the guard, which begins with @)."""
    label = ""
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            label = found.group(1)
        elif found := _LINE.search(line):
            yield label, found.group(3), (found.group(2) or "") + found.group(4)
            label = ""


def _loop_ranges(code: list[tuple[str, str, str]]) -> list[tuple[int, int]]:
    """Return [first, last) of every backward branch, the branch to itself that ends a kernel aside."""
    places = {label: i for i, (label, _, _) in enumerate(code) if label}
    ranges = []
    for i, (_, opcode, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and target and places.get(target.group(0), i) < i:
            ranges.append((places[target.group(0)], i))
    return ranges


def _sass_edges(code: list[tuple[str, str, str]]) -> list[list[int]]:
    """Return for each instruction those that may come next."""
    places = {label: i for i, (label, _, _) in enumerate(code) if label}
    edges = []
    for i, (_, opcode, operands) in enumerate(code):
        leaves = opcode.startswith(("BRA", "EXIT", "RET")) and not operands.startswith("@")
        target = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
        edges.append(([] if leaves else [i + 1]) + ([places[target.group(0)]] if target else []))
    return edges


def _on_cycles(wanted: list[int], edges: list[list[int]]) -> int:
    """Count the instructions from which a way leads back to them: those in loops, wherever a loop's parts were put."""
    count = 0
    for start in wanted:
        seen: set[int] = set()
        ahead = list(edges[start])
        while ahead and start not in seen:
            i = ahead.pop()
            if i < len(edges) and i not in seen:
                seen.add(i)
                ahead += edges[i]
        count += start in seen
    return count


def hot_loop(compiled: Compiled) -> tuple[int, int]:
    """Return how many instructions the innermost loop with the most has, and how many are fused multiply-adds; SASS."""
    code = list(_instructions(compiled.sass))
    first, last = max(_loop_ranges(code), key=lambda loop: loop[1] - loop[0])
    opcodes = [opcode for _, opcode, _ in code[first : last + 1]]
    return len(opcodes), sum(opcode.startswith("FFMA") for opcode in opcodes)


def _in_flight(code: list[tuple[str, str, str]]) -> int:
    """Walk the code in order: a load is in flight from its issue to the first use of its register."""
    waiting: dict[int, int] = {}
    most = 0
    for _, opcode, operands in code:
        registers = [int(number) for number in _REGISTER.findall(operands)]
        if opcode.startswith("LDG") and registers:
            for register in registers[1:]:
                waiting.pop(register, None)
            suffixes = opcode.split(".")
            waiting[registers[0]] = next((_WIDTH[s] for s in suffixes if s in _WIDTH), 4)
            most = max(most, sum(waiting.values()))
        else:
            for register in registers:
                waiting.pop(register, None)
    return most


def _from_amdgcn(compiled: Compiled) -> Facts:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    lines = [line.strip() for line in text.splitlines()]
    opcodes = [line.split()[0] if line and not line.startswith((".", ";")) else "" for line in lines]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".LBB")}
    edges = []
    for i, line in enumerate(lines):
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        leaves = opcodes[i] in ("s_branch", "s_endpgm")
        edges.append(([] if leaves else [i + 1]) + ([labels[target.group(1)]] if target else []))
    return Facts(
        registers=field("vgpr_count"),
        stack_bytes=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count") + len([op for op in opcodes if op.startswith("scratch_")]),
        shared_bytes=field("group_segment_fixed_size"),
        loop_barriers=_on_cycles([i for i, op in enumerate(opcodes) if op.startswith("s_barrier")], edges),
        loads=sum(op.startswith(("global_load", "buffer_load")) for op in opcodes),
        fmas=sum(op.startswith(("v_fma", "v_pk_fma", "v_fmac")) for op in opcodes),
        in_flight_bytes=64 * _in_flight_amd(opcodes, lines),
    )


def _in_flight_amd(opcodes: list[str], lines: list[str]) -> int:
    """Count loads issued before a wait lets only some of them remain."""
    width = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "ubyte": 1, "short": 2}
    queue: list[int] = []
    most = 0
    for opcode, line in zip(opcodes, lines, strict=True):
        if opcode.startswith(("global_load", "buffer_load")):
            queue.append(next((size for name, size in width.items() if opcode.endswith(f"_{name}")), 4))
            most = max(most, sum(queue))
        elif opcode == "s_waitcnt" and (left := re.search(r"vmcnt\((\d+)\)", line)):
            queue = queue[len(queue) - int(left.group(1)) :] if int(left.group(1)) else []
    return most
