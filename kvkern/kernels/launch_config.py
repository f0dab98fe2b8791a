"""Launch configurations: frozen, one JSON file per architecture, never tuned at run time. No bit depends on them."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvkern.errors import UnsupportedError

CONFIGS = Path(__file__).parent / "configs"
_NEAREST = {"sm80": "sm80", "sm86": "sm80", "sm89": "sm80", "sm90": "sm90", "sm100": "sm100", "sm120": "sm100",
            "gfx942": "gfx942", "interpreter": "interpreter"}  # fmt: skip


@dataclass(frozen=True)
class ExactConfig:
    """How the exact kernel is launched.

    Attributes:
        score_rows: query rows that a score program takes at most.
        score_words: words of two keys that a score program takes.
        score_unroll: channel pairs whose loads are in flight together.
        softmax_keys: keys of a row per pass.
        softmax_passes: passes of a program; a longer row has more programs.
        softmax_steps: groups of 16 keys whose loads are in flight together, 2 or a greater power of two; 16 times as
            many divide softmax_keys.
        output_rows: query rows that an output program takes at most, a power of two.
        output_lanes: rows times words of two channels of an output program, at most.
        output_tiles: tiles of V in flight together, 1, 2 or 4; as many times 64 keys divide softmax_keys.
        fold_runs: run sums whose loads are in flight together.
        lag: KV heads by which softmax is behind the scores, where there are so many.
        warps: of a program.
        max_registers: of a thread, where the compiler would take fewer and spill; 0 leaves it to the compiler.
        launches: 1, on NVIDIA's GPUs, or 3 for a launch of each phase.
        pull: whether programs ask the L2 for all of their K or V at once: NVIDIA's, since sm_90.
        warm: whether they ask the L1 ahead for q, p and lengths, which are read word by word: NVIDIA's.
    """

    score_rows: int
    score_words: int
    score_unroll: int
    softmax_keys: int
    softmax_passes: int
    softmax_steps: int
    output_rows: int
    output_lanes: int
    output_tiles: int
    fold_runs: int
    lag: int
    warps: int
    max_registers: int
    launches: int
    pull: bool
    warm: bool

    @property
    def options(self) -> dict[str, int]:
        """Compile options beside the number of warps."""
        return {"maxnreg": self.max_registers} if self.max_registers else {}

    def score_unroll_for(self, head_dim: int) -> int:
        """Channel pairs per trip: a divisor of head_dim / 2."""
        return math.gcd(self.score_unroll, head_dim // 2)

    def output_shape(self, num_rows: int, head_dim: int) -> tuple[int, int, int]:
        """Rows and words of an output program, both powers of two, and pieces of a row of V, at most 8."""
        rows = 1 << (min(self.output_rows, num_rows) - 1).bit_length()
        full = 1 << (head_dim // 2 - 1).bit_length()
        words = min(max(self.output_lanes // rows, full // 8), full)
        pieces = -(-head_dim // 2 // words)
        return rows, words, pieces


@dataclass(frozen=True)
class FastConfig:
    """How the fast kernel is launched, and what its cost model assumes of the machine.

    Attributes:
        block_m: rows of a program.
        warps: warps of a program.
        max_registers: of a thread, where the compiler would take fewer and spill; 0 leaves it to the compiler.
        stages: depth of the software pipeline over tiles.
        fold_rows: rows that the last arriver folds at once.
        units_d64: keys that a program may take with head_dim 64; the cost model chooses among them.
        units_d128: the same with head_dim 128. A unit is listed where its kernel does not spill.
        sms: multiprocessors.
        programs_per_sm: programs that a multiprocessor holds at once.
        hbm_bytes_s: bandwidth of the memory.
        l2_bytes_s: bandwidth of the last cache.
        l2_bytes: size of the last cache.
        flops_s: rate of the tensor cores, as Triton's attention reaches it.
        latency_s: from a load to its data.
    """

    block_m: int
    warps: int
    max_registers: int
    stages: int
    fold_rows: int
    units_d64: tuple[int, ...]
    units_d128: tuple[int, ...]
    sms: int
    programs_per_sm: int
    hbm_bytes_s: float
    l2_bytes_s: float
    l2_bytes: int
    flops_s: float
    latency_s: float

    @property
    def options(self) -> dict[str, int]:
        """Compile options beside the number of warps."""
        return {"maxnreg": self.max_registers} if self.max_registers else {}

    def units(self, head_dim: int) -> tuple[int, ...]:
        """Keys that a program may take."""
        return self.units_d64 if head_dim <= 64 else self.units_d128


@functools.cache
def exact_config(architecture: str) -> ExactConfig:
    """Return the shipped configuration of the exact kernels for an architecture, such as `sm90`.

    Raises:
        UnsupportedError: none is shipped for it or for its family.
    """
    values = _section(architecture, "exact")
    return ExactConfig(**{field.name: values[field.name] for field in fields(ExactConfig)})


@functools.cache
def fast_config(architecture: str) -> FastConfig:
    """Return the shipped configuration of the fast kernel; errors as in `exact_config`."""
    values = _section(architecture, "fast")
    units = {name: tuple(values[name]) for name in ("units_d64", "units_d128")}
    return FastConfig(**{field.name: values[field.name] for field in fields(FastConfig)} | units)


@dataclass(frozen=True)
class ModelConfig:
    """How the kernels of contract part B are launched.

    Attributes:
        few_rows: rows up to which a Linear is bound by the weight's bytes.
        few: rows and words of two channels of a program, k loaded together, warps.
        many: the same above few_rows; rows a power of two.
        pack_pairs: pairs of k that a program lays out for `many`.
        pack_warps: warps of that program.
        fold_words: words of two channels that a fold program takes.
        fold_runs: run sums whose loads are in flight together.
        fold_warps: warps of a fold program.
        norm_lanes: channels per pass of a row's program.
        norm_warps: warps of a row's program.
        rotary_warps: warps of a program, one head of one token.
        activation_lanes: elements of a SiLU program.
        activation_warps: warps of a SiLU program.
    """

    few_rows: int
    few: tuple[int, int, int, int]
    many: tuple[int, int, int, int]
    pack_pairs: int
    pack_warps: int
    fold_words: int
    fold_runs: int
    fold_warps: int
    norm_lanes: int
    norm_warps: int
    rotary_warps: int
    activation_lanes: int
    activation_warps: int


@functools.cache
def model_config(architecture: str) -> ModelConfig:
    """Return the shipped configuration of part B for an architecture; raises as `exact_config`."""
    values = _section(architecture, "model")
    return ModelConfig(
        **{
            field.name: tuple(values[field.name]) if isinstance(values[field.name], list) else values[field.name]
            for field in fields(ModelConfig)
        }
    )


def _section(architecture: str, name: str) -> dict[str, Any]:
    file = _NEAREST.get(architecture)
    if file is None:
        raise UnsupportedError(
            f"no launch configuration for {architecture!r}; shipped are {', '.join(sorted(set(_NEAREST.values())))}"
        )
    return json.loads((CONFIGS / f"{file}.json").read_text())[name]
