"""Who does what in an exact launch, and when: tickets, items and the counters that programs wait for.

A call is a list of items. KV head after KV head its scores come first, the softmax of a head LAG heads behind its
scores, so that its long chain of additions runs while other heads read K; then come the outputs, head after head. A
program draws a ticket, which says its item, so items begin in the order of the list whatever the order in which a GPU
starts programs. An item waits for earlier items alone, and those are in the hands of programs that run: nobody waits
for a program that has not begun. Where the phases are launches of their own, nobody waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTERS = tl.constexpr(16)
"""int32 of a row, all 0 before and after a call."""
# The first counts softmax programs of the row, the next eight output programs, one for each piece of the channels.
SCORED = tl.constexpr(9)
"""In the first row of a reader's KV head: score programs that have left their scores."""
READY = tl.constexpr(10)
"""In the same row: rows whose p is there."""
TICKETS = tl.constexpr(11)
"""In the first row of all: tickets drawn."""
GONE = tl.constexpr(12)
"""In the same row: programs that have done their item."""
CLEARED = tl.constexpr(256)
"""Counters that the last program clears at once."""
MAGIC_BITS = tl.constexpr(40)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""There is no assembly in the interpreter; an ordinary load does there."""


def magic(divisor: int) -> int:
    """Return the factor with which `divide` divides by a number that only the host knows."""
    return (1 << MAGIC_BITS.value) // divisor + 1


@triton.jit
def divide(n, factor):
    """Return n // divisor for n * divisor < 2^40 and n < 2^22, where factor is `magic(divisor)`; no floating point."""
    return ((n.to(tl.int64) * factor) >> MAGIC_BITS).to(tl.int32)


@triton.jit
def item_of(ticket, sizes, KV_HEADS: tl.constexpr, LAG: tl.constexpr):
    """Return phase (0 score, 1 softmax, 2 output), KV head and the number of an item among those of that head."""
    score_items, softmax_items, output_items = sizes
    step, size = 0, score_items
    outputs: tl.constexpr = 2 * (KV_HEADS + LAG)  # the step at which they begin; before it, scores are the even steps
    while ticket >= size:
        ticket -= size
        step += 1
        size = tl.where(step // 2 < KV_HEADS, score_items, 0)
        size = tl.where(step % 2 == 1, tl.where(step // 2 >= LAG, softmax_items, 0), size)
        size = tl.where(step >= outputs, output_items, size)
    phase = tl.where(step >= outputs, 2, step % 2)
    lead = tl.where(phase == 2, outputs, 2 * LAG * phase)
    head = tl.where(phase == 2, step - lead, (step - lead) // 2)
    return phase, head, ticket


@triton.jit
def arrive(counter):
    """Count this program, after all of its stores; returns how many have come before, whose stores are then seen."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def await_count(counter, count):
    """Wait until `count` programs have arrived; what they have stored may not be seen yet."""
    while tl.load(counter, volatile=True) < count:
        pass


@triton.jit
def wait_for(counter, count):
    """Wait until `count` programs have arrived, and see what they have stored: every thread by itself, no barrier.

    A look that acquires empties the L1, which others need meanwhile: only when one alone is missing does it look so.
    """
    await_count(counter, count - 1)
    while _acquired(counter) < count:
        pass


@triton.jit
def _acquired(counter):
    if INTERPRETED:
        value = tl.load(counter)
    else:
        value = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    return value


@triton.jit
def leave(counters_ptr, programs, counters):
    """Count a program that has nothing left to do; the last one clears all counters for the next call."""
    if arrive(counters_ptr + GONE) == programs - 1:
        lane = tl.arange(0, CLEARED)
        for start in range(0, counters, CLEARED):
            tl.store(counters_ptr + start + lane, 0, mask=start + lane < counters)
