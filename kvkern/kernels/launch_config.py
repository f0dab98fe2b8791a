"""Launch configurations: frozen, one JSON file per architecture, never tuned at run time. No bit depends on them."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from kvkern.errors import UnsupportedError

CONFIGS = Path(__file__).parent / "configs"
_NEAREST = {"sm80": "sm80", "sm86": "sm80", "sm89": "sm80", "sm90": "sm90", "sm100": "sm100", "sm120": "sm100",
            "gfx942": "gfx942", "interpreter": "interpreter"}  # fmt: skip


@dataclass(frozen=True)
class ExactConfig:
    """How the four exact kernels are launched.

    Attributes:
        score_rows: query rows that a score program takes at most.
        score_words: words of two keys that a score program takes.
        score_unroll: channel pairs whose loads are in flight together.
        score_warps: warps of a score program.
        softmax_keys: keys per pass of a row.
        softmax_steps: groups of 16 keys whose loads are in flight together.
        softmax_warps: warps of a row's program.
        output_rows: query rows that an output program takes at most.
        output_words: words of two channels that an output program takes.
        output_warps: warps of an output program.
        fold_runs: run sums whose loads are in flight together.
        fold_warps: warps of a fold program.
    """

    score_rows: int
    score_words: int
    score_unroll: int
    score_warps: int
    softmax_keys: int
    softmax_steps: int
    softmax_warps: int
    output_rows: int
    output_words: int
    output_warps: int
    fold_runs: int
    fold_warps: int

    def score_unroll_for(self, head_dim: int) -> int:
        """Channel pairs per trip: a divisor of head_dim / 2."""
        return math.gcd(self.score_unroll, head_dim // 2)

    def output_words_for(self, head_dim: int) -> int:
        """Words of an output program: no more than a row of V has, rounded up to a power of two."""
        return min(self.output_words, 1 << (head_dim // 2 - 1).bit_length())


@functools.cache
def exact_config(architecture: str) -> ExactConfig:
    """Return the shipped configuration of an architecture, such as `sm90`.

    Raises:
        UnsupportedError: none is shipped for it or for its family.
    """
    name = _NEAREST.get(architecture)
    if name is None:
        raise UnsupportedError(
            f"no launch configuration for {architecture!r}; shipped are {', '.join(sorted(set(_NEAREST.values())))}"
        )
    values = json.loads((CONFIGS / f"{name}.json").read_text())["exact"]
    return ExactConfig(**{field.name: values[field.name] for field in fields(ExactConfig)})
