"""Softmax of the contract (A2 to A4): exponentials by parts of a row, then, by the last part to arrive, sum and p."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.exact_rows import all_keys, first_of, key_at, second_of, visible_keys
from kvkern.kernels.exact_tickets import COUNTERS, SCORED, arrive, wait_for
from kvkern.kernels.primitives import (
    INFINITY_KEY,
    MINUS_INFINITY_KEY,
    exp_c,
    from_order_key,
    halve16,
    log_n,
    round16,
)

TILE = tl.constexpr(64)
TOPS = tl.constexpr(512)
"""Maxima of score programs that are loaded together."""


@triton.jit
def softmax(
    top_ptr, e_ptr, pairs_ptr, flag_ptr, lse_ptr, counters_ptr, readers, rows, has_lse, key_capacity,
    score_programs, row, b, part, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, KEYS: tl.constexpr, PASSES: tl.constexpr,
    STEPS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Take exponentials of PASSES * KEYS keys of a row; its last program adds them up and makes p of them.

    Arguments as in `exact_kernel`. Returns whether the row's p is there now. What is loaded past the last key that is
    seen may be anything, and is dropped; what is stored there adds nothing.
    """
    prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr, query_len_ptr = readers
    num_rows, max_query_len, first_query = rows
    is_last = part < 0
    query = first_query + row // GROUP
    keys = all_keys(b, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr)
    visible = visible_keys(keys, query, tl.load(query_len_ptr + b), max_query_len)
    parts = tl.maximum((visible + PASSES * KEYS - 1) // (PASSES * KEYS), 1)
    if part < parts:
        out_row = (b * KV_HEADS + kv_head).to(tl.int64) * num_rows + row
        row_start = tl.multiple_of(out_row * key_capacity, TILE)
        e_row = e_ptr + row_start
        place = tl.arange(0, KEYS)
        first = part * (PASSES * KEYS)
        if WAITS:
            scored = counters_ptr + (b * KV_HEADS + kv_head).to(tl.int64) * num_rows * COUNTERS + SCORED
            wait_for(scored, score_programs)
        t = tl.load(e_row + first + place)  # on its way while the maximum is found
        largest, is_nan = _largest(top_ptr + out_row * (key_capacity // (2 * WORDS)), visible, WORDS)
        for start in range(first, tl.minimum(first + PASSES * KEYS, visible), KEYS):
            upcoming = tl.load(e_row + _within(start + KEYS, key_capacity, KEYS) + place)
            is_seen = (start + key_at(place) < visible) & (is_nan == 0)
            tl.store(e_row + start + place, exp_c(tl.where(is_seen, t - largest, float("-inf"))))
            t = upcoming
        count = parts - 1
        tl.debug_barrier()  # the sum reads what other threads have just written
        if parts > 1:
            count = arrive(counters_ptr + out_row * COUNTERS)
        is_last = count == parts - 1
        if is_last:
            total = _probabilities(e_row, pairs_ptr + row_start // 2, visible, key_capacity, KEYS, STEPS)
            tl.store(flag_ptr + out_row, is_nan.to(tl.int32))
            if has_lse != 0:
                nan = tl.full([], 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
                lse = tl.where(is_nan, nan, largest + log_n(total))
                lse = tl.where(visible > 0, lse, float("-inf"))
                head = b * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
                tl.store(lse_ptr + head.to(tl.int64) * max_query_len + query, lse)
    return is_last


@triton.jit
def _largest(top_ptr, visible, WORDS: tl.constexpr):
    """A2, and whether A8 makes the row NaN."""
    lane = tl.arange(0, TOPS)
    top = tl.full([TOPS], -0x80000000, tl.int32)
    blocks = (visible + 2 * WORDS - 1) // (2 * WORDS)
    for start in range(0, blocks, TOPS):
        there = start + lane < blocks
        top = tl.maximum(top, tl.load(top_ptr + start + lane, mask=there, other=-0x80000000))
    key = tl.max(top, axis=0)
    return from_order_key(key), (key >= INFINITY_KEY) | (key <= MINUS_INFINITY_KEY)


@triton.jit
def _within(start, key_capacity, KEYS: tl.constexpr):
    """Where to load the KEYS of `start` from: past the end of a row, its last ones again."""
    return tl.multiple_of(tl.minimum(start, key_capacity.to(tl.int32) - KEYS), KEYS)


@triton.jit
def _probabilities(e_row, pairs_row, visible, key_capacity, KEYS: tl.constexpr, STEPS: tl.constexpr):
    """Add up a row, and turn it into p, kept in fp32; returns the sum. Loads of STEPS groups of 16 keys are under way.

    Behind the last visible key p is -0, up to the end of a tile that another row of an output program may see.
    """
    place = tl.arange(0, KEYS)
    e = tl.load(e_row + place)
    tl.static_assert(STEPS % 2 == 0 and KEYS % (16 * STEPS) == 0)
    sums = tl.zeros([16], tl.float32)
    pairs = ()
    for _ in tl.static_range(STEPS // 2):
        pairs = pairs + (tl.zeros([16], tl.int64),)
    # A pair is asked for when the one that it replaces has been spent. The first trip adds zeros, and asks.
    for start in range(0, visible + 16 * STEPS, 16 * STEPS):
        ptrs = pairs_row + _within(start, key_capacity, 16 * STEPS) // 2 + tl.arange(0, 16)
        fresh = ()
        for i in tl.static_range(STEPS // 2):
            sums += first_of(pairs[i])
            sums += second_of(pairs[i])
            fresh = fresh + (tl.load(ptrs + 16 * i),)
        pairs = fresh
    total = halve16(sums)
    total = tl.where(total > 0.0, total, 1.0)  # a row that sees nothing, or that is NaN, divides by something
    reciprocal = tl.div_rn(1.0, total)
    tl.debug_barrier()  # p takes the place of e, which every warp has added up for itself
    for start in range(0, tl.minimum(visible + TILE, key_capacity.to(tl.int32)), KEYS):
        upcoming = tl.load(e_row + _within(start + KEYS, key_capacity, KEYS) + place)
        p = tl.where(start + key_at(place) < visible, round16(e * reciprocal), -0.0)
        tl.store(e_row + start + place, p)
        e = upcoming
    return total
