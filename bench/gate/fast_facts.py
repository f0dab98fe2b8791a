"""What the gate watches of a kernel on tensor cores, and what it refuses: the instruction, the pipeline, occupancy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.gate.facts import facts_of
from bench.gate.rules import fused_without_being_asked
from kvkern.kernels.launch_config import fast_config

if TYPE_CHECKING:
    from bench.gate.compiler import Compiled

PRODUCTS = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}
"""The instruction that a product must be on a target."""
SHARED_BYTES = {"sm80": 163_840, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}
"""What the programs of one multiprocessor share; NVIDIA takes 1,024 more for each."""
REGISTERS = 65_536


@dataclass(frozen=True)
class FastFacts:
    """Further facts of a fast kernel.

    Attributes:
        products: tensor core instructions.
        other_products: those of another generation than the target's.
        product_waits: times that a warp waits for products; more than two a loop means that they run one by one.
        depth: tiles of K, and of V, that lie in shared memory at once.
        tma_copies: bulk copies; none are claimed.
        programs_per_sm: that fit, by registers and by shared memory.
    """

    products: int
    other_products: int
    product_waits: int
    depth: int
    tma_copies: int
    programs_per_sm: int


def fast_facts_of(compiled: Compiled) -> FastFacts:
    """Read the facts out of PTX or AMD's assembly, SASS and Triton's GPU stage."""
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    mine = PRODUCTS[compiled.target]
    counts = {n: len(re.findall(rf"^\s*(?:@%?!?\w+\s+)?{re.escape(n)}", code, re.M)) for n in PRODUCTS.values()}
    allocated = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+xbf16", compiled.asm["ttgir"])
    depths = [int(n) for n in allocated]
    return FastFacts(
        products=counts[mine],
        other_products=sum(counts.values()) - counts[mine],
        product_waits=len(re.findall(r"WARPGROUP\.DEPBAR", compiled.sass)),
        depth=min(depths) if len(depths) == 2 else 0,
        tma_copies=len(re.findall(r"cp\.async\.bulk", code)),
        programs_per_sm=_programs_per_sm(compiled),
    )


def _programs_per_sm(compiled: Compiled) -> int:
    facts, warps = facts_of(compiled), compiled.case.num_warps
    if compiled.target.startswith("gfx"):
        by_registers = 512 // facts.registers * 4 // warps
        extra = 0
    else:
        by_registers = REGISTERS // (-(-facts.registers // 8) * 8 * 32 * warps)
        extra = 1024
    return min(by_registers, SHARED_BYTES[compiled.target] // (compiled.shared_bytes + extra))


def fast_problems_of(compiled: Compiled) -> list[str]:
    """Name what no fast kernel may have: spills, the wrong product, a shallow pipeline, fewer programs than planned."""
    facts, fast, config = facts_of(compiled), fast_facts_of(compiled), fast_config(compiled.target)
    problems = []
    if facts.stack_bytes or facts.spills:
        problems.append(f"spills: {facts.stack_bytes} bytes of stack, {facts.spills} instructions")
    if not fast.products or fast.other_products:
        problems.append(
            f"products: {fast.products} {PRODUCTS[compiled.target]} and {fast.other_products} others; only the first "
            "kind is allowed"
        )
    depth = config.stages if compiled.target in ("sm90", "sm100") else config.stages - 1
    if fast.depth != depth:
        problems.append(f"depth: {fast.depth} tiles of K and V in shared memory, {depth} are configured")
    tile_bytes = 2 * 64 * compiled.case.constants.get("HEAD_DIM", 0) * 2
    if compiled.sass and compiled.shared_bytes < fast.depth * tile_bytes:
        problems.append(f"depth: {compiled.shared_bytes} shared bytes do not hold {fast.depth} tiles")
    if fast.product_waits > 2:
        problems.append(f"serial products: {fast.product_waits} waits for 2 products")
    if fast.tma_copies:
        problems.append(f"{fast.tma_copies} bulk copies: the kernel claims none")
    if "ptx" in compiled.asm and not re.search(r"\batom\.[\w.]*gpu\.acq_rel", compiled.asm["ptx"]):
        problems.append("arrival: no acq_rel atomic, so the last program may fold states that have not arrived")
    if fast.programs_per_sm < config.programs_per_sm:
        problems.append(f"occupancy: {fast.programs_per_sm} programs fit, the plan counts {config.programs_per_sm}")
    return problems + fused_without_being_asked(compiled.asm)


def layouts(compiled: Compiled) -> tuple[str, ...]:
    """Return the layouts of products: units whose layouts differ would add a row's weights in another order."""
    text = compiled.asm["ttgir"]
    return tuple(sorted(set(re.findall(r"^#\w+ = (#ttn?g\.(?:nvidia_mma|amd_mfma|tensor_memory)\S*<.*>)", text, re.M))))
