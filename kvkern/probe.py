"""Does this host's torch add in the contract's order? Matmuls with planted +2^40, -2^40 and 1 tell, and a softmax."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvkern.contract import KEY_RUN, KEY_RUN_LONG, LINEAR_LONG_ABOVE, LINEAR_RUN, LINEAR_RUN_LONG
from kvkern.environment import cpu_isa

if TYPE_CHECKING:
    from collections.abc import Callable

_BIG = 2.0**40


@dataclass(frozen=True)
class Probe:
    """Whether stock eager attention follows the contract here, and why.

    Attributes:
        follows: every planted sum came out as the contract's order makes it.
        reason: what was found, in words, with torch version and instruction set.
    """

    follows: bool
    reason: str


@functools.cache
def stock_order() -> Probe:
    """Probe the pair order and the run lengths of stock bf16 matmul on this CPU.

    Returns:
        The finding. Stock parity is claimed, and tested, only where it follows.

    Source:
        The idea of planting large summands is FPRev's (arXiv 2411.00442).
    """
    host = f"torch {torch.__version__} on a CPU with {cpu_isa()}"
    checks = {
        "the odd element of a pair first": _sum_of({0: 1.0, 1: _BIG, 2: -_BIG}, rows=1, length=64) == 0.0
        and _sum_of({0: -_BIG, 1: _BIG, 2: 1.0}, rows=1, length=64) == 1.0
        and _sum_of({0: _BIG, 1: 1.0, 2: -_BIG}, rows=1, length=64) == 0.0
        and _sum_of({1: _BIG, 2: 1.0, 3: -_BIG}, rows=1, length=64) == 1.0,
        f"runs of {KEY_RUN} for one row": _run_length(rows=1, length=2048) == KEY_RUN,
        f"runs of {KEY_RUN} for two rows of 1024": _run_length(rows=2, length=1024) == KEY_RUN,
        f"runs of {KEY_RUN_LONG} for two rows of 2048": _run_length(rows=2, length=2048) == KEY_RUN_LONG,
        f"runs of {LINEAR_RUN} in a Linear of {LINEAR_LONG_ABOVE}": _linear_run(LINEAR_LONG_ABOVE) == LINEAR_RUN,
        f"runs of {LINEAR_RUN_LONG} in a Linear of 2048": _linear_run(2048) == LINEAR_RUN_LONG,
        "the contract's exponential in softmax": _last_probability() == 0.310546875,
    }
    missing = [name for name, holds in checks.items() if not holds]
    if missing:
        return Probe(
            False, f"stock bf16 arithmetic of {host} does not add in the contract's order: not {', not '.join(missing)}"
        )
    return Probe(True, f"stock bf16 arithmetic of {host} adds in the contract's order")


def _sum_of(summands: dict[int, float], *, rows: int, length: int) -> float:
    """Add planted summands, others 0, through a batched bf16 matmul like attention's."""
    left = _planted(summands, (1, 2, rows, length))
    return float(torch.matmul(left, torch.ones(1, 2, length, 64, dtype=torch.bfloat16))[0, 0, 0, 0])


def _linear_sum_of(summands: dict[int, float], *, rows: int, length: int) -> float:
    """Add planted summands, others 0, through a bf16 Linear."""
    return float(F.linear(_planted(summands, (rows, length)), torch.ones(64, length, dtype=torch.bfloat16))[0, 0])


def _last_probability() -> float:
    """Softmax in fp32, rounded, of a row whose last probability another exponential rounds to 0.3125."""
    row = torch.full((37,), -200.0, dtype=torch.bfloat16)
    row[[0, -2, -1]] = torch.tensor([0.0, -0.1328125, -0.1640625], dtype=torch.bfloat16)
    return float(F.softmax(row, dim=-1, dtype=torch.float32).to(torch.bfloat16)[-1])


def _planted(summands: dict[int, float], shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    for index, value in summands.items():
        tensor[..., index] = value
    return tensor


def _linear_run(length: int) -> int:
    return _run_length(rows=2, length=length, add=_linear_sum_of)


def _run_length(*, rows: int, length: int, add: Callable[..., float] = _sum_of) -> int:
    """Length of the first run: a 1 after +2^40 and -2^40 survives only if both were in its own chain."""
    for run in (KEY_RUN, KEY_RUN_LONG):
        if run >= length:
            break
        unbroken = add({2: _BIG, run - 4: -_BIG, run - 2: 1.0}, rows=rows, length=length) == 1.0
        broken = add({2: _BIG, run + 2: -_BIG, run + 4: 1.0}, rows=rows, length=length) == 0.0
        if unbroken and broken:
            return run
    return length
