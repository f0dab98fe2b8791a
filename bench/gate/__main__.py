"""`python -m bench.gate [--update]`: compile all cases for all targets, print the table, compare it with the record."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton

from bench.gate.cases import exact_cases
from bench.gate.compiler import TARGETS, Case, Compiled, compile_case
from bench.gate.facts import facts_of
from bench.gate.fast_cases import fast_cases
from bench.gate.fast_facts import fast_facts_of, fast_problems_of, layouts
from bench.gate.rules import violations

TABLE = Path(__file__).parent / "table.json"


GROWING = ("in_flight_bytes", "products", "depth", "programs_per_sm")
"""Figures that may only grow; all others may only shrink."""


FAST_SINCE = (3, 9)
"""Under Triton 3.6 one fast kernel (sm90, head_dim 128, unit 1,024) keeps 8 bytes on the stack."""


def gates_fast() -> bool:
    """Whether this Triton's fast kernels are held to their figures."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= FAST_SINCE


def cases(target: str) -> list[Case]:
    """Return all cases of a target."""
    return [*exact_cases(target), *(fast_cases(target) if gates_fast() else [])]


def check(target: str, number: int) -> tuple[str, str, dict[str, int], list[str], tuple[str, ...]]:
    """Compile one case; returns target, name, facts, what is forbidden in it, and its layouts."""
    case = cases(target)[number]
    compiled = compile_case(case, target)
    facts = asdict(facts_of(compiled))
    if case.profile == "fast":
        facts |= asdict(fast_facts_of(compiled))
    return target, case.name, facts, problems_of(compiled), layouts(compiled) if case.profile == "fast" else ()


def unlike(results: list[tuple[str, str, dict[str, int], list[str], tuple[str, ...]]]) -> list[str]:
    """Name the fast cases whose products are laid out unlike those of another unit of the same shape."""
    first: dict[tuple[str, str], tuple[str, ...]] = {}
    return [
        f"{target} {name}: laid out unlike another unit, whose bits it must have"
        for target, name, _, _, found in results
        if found and first.setdefault((target, re.sub(r"-U\d+", "", name)), found) != found
    ]


def problems_of(compiled: Compiled) -> list[str]:
    """Name what no kernel of a profile may have; for exact: a forbidden instruction, a spill, a barrier in a loop."""
    if compiled.case.profile == "fast":
        return fast_problems_of(compiled)
    facts = facts_of(compiled)
    problems = violations(compiled)
    if facts.stack_bytes or facts.spills:
        problems.append(f"spills: {facts.stack_bytes} bytes of stack, {facts.spills} instructions")
    if facts.loop_barriers:
        problems.append(f"{facts.loop_barriers} barriers inside loops")
    return problems


def main(targets: list[str], *, update: bool) -> int:
    """Run the gate; returns the exit code."""
    start = time.perf_counter()
    jobs = [(target, number) for target in targets for number in range(len(cases(target)))]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(check, *zip(*jobs, strict=True)))
    recorded = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = recorded.get(triton.__version__, {})
    table: dict[str, dict[str, dict[str, int]]] = {}
    failed = 0
    for problem in (others := unlike(results)):
        print(f"FAILED: {problem}")
    failed += len(others)
    for target, name, facts, problems, _ in results:
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
    if not gates_fast():
        print(f"NOT COMPILED: the fast kernels, which are gated from triton {FAST_SINCE[0]}.{FAST_SINCE[1]} on")
    took = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(results)} compiles, {took:.0f} s, {failed} failed")
    return 1 if failed else 0


def worse(facts: dict[str, int], old: dict[str, int]) -> list[str]:
    """Name the figures that are worse than those on record."""
    found = []
    for name, value in facts.items():
        is_worse = value < old[name] if name in GROWING else value > old[name]
        if is_worse:
            found.append(f"{name} is {value}, on record is {old[name]}")
    return found


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options.add_argument("--update", action="store_true", help="put the figures of all targets on record")
    given = options.parse_args()
    if given.update and given.targets != list(TARGETS):
        options.error("--update puts all targets on record: leave --targets out")
    sys.exit(main(given.targets, update=given.update))
