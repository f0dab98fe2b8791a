"""`python -m bench.gate [--update]`: compile all cases for all targets, print the table, compare it with the record."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton

from bench.gate.cases import exact_cases
from bench.gate.compiler import TARGETS, Compiled, compile_case
from bench.gate.facts import facts_of
from bench.gate.rules import violations

TABLE = Path(__file__).parent / "table.json"


def check(target: str, number: int) -> tuple[str, str, dict[str, int], list[str]]:
    """Compile one case; returns target, name, facts, and what is forbidden in it."""
    case = exact_cases(target)[number]
    compiled = compile_case(case, target)
    return target, case.name, asdict(facts_of(compiled)), problems_of(compiled)


def problems_of(compiled: Compiled) -> list[str]:
    """Name what no exact kernel may have: a forbidden instruction, a spill, a barrier in a loop."""
    facts = facts_of(compiled)
    problems = violations(compiled)
    if facts.stack_bytes or facts.spills:
        problems.append(f"spills: {facts.stack_bytes} bytes of stack, {facts.spills} instructions")
    if facts.loop_barriers:
        problems.append(f"{facts.loop_barriers} barriers inside loops")
    return problems


def main(update: bool) -> int:
    """Run the gate; returns the exit code."""
    start = time.perf_counter()
    jobs = [(target, number) for target in TARGETS for number in range(len(exact_cases(target)))]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(check, *zip(*jobs, strict=True)))
    recorded = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = recorded.get(triton.__version__, {})
    table: dict[str, dict[str, dict[str, int]]] = {}
    failed = 0
    for target, name, facts, problems in results:
        table.setdefault(target, {})[name] = facts
        old = known.get(target, {}).get(name)
        if old is None and not update:
            problems = [*problems, "not on record: run with --update and commit the table"]
        elif old is not None and not update:
            problems = [*problems, *worse(facts, old)]
        print(f"{target:7} {name:18} " + "  ".join(f"{n} {v}" for n, v in facts.items()))
        for problem in problems:
            print(f"        FAILED: {problem}")
        failed += bool(problems)
    if update and not failed:
        TABLE.write_text(json.dumps({**recorded, triton.__version__: table}, indent=1) + "\n")
    took = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(results)} compiles, {took:.0f} s, {failed} failed")
    return 1 if failed else 0


def worse(facts: dict[str, int], old: dict[str, int]) -> list[str]:
    """Name the figures that are worse than those on record; bytes in flight may only grow, all others only shrink."""
    found = []
    for name, value in facts.items():
        is_worse = value < old[name] if name == "in_flight_bytes" else value > old[name]
        if is_worse:
            found.append(f"{name} is {value}, on record is {old[name]}")
    return found


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv[1:]))
