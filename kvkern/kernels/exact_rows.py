"""What the rows of a call see, and the step that every chain of the contract takes: shared by the exact kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern.kernels.primitives import widen_high, widen_low


@triton.jit
def all_keys(b, prefix_len_ptr, reader_prefix_ptr, suffix_len_ptr):
    """Keys of a reader."""
    return tl.load(prefix_len_ptr + tl.load(reader_prefix_ptr + b)) + tl.load(suffix_len_ptr + b)


@triton.jit
def visible_keys(keys, query, query_len, max_query_len):
    """Keys that a query sees; 0 for padding."""
    seen = tl.maximum(keys - (max_query_len - 1 - query), 0)
    return tl.where(query >= max_query_len - query_len, seen, 0)


@triton.jit
def run_shift(key_run, query_len, keys):
    """Binary logarithm of a reader's KEY_RUN, 512 or 1024; 0 is stock's rule."""
    is_long = (key_run == 1024) | ((key_run == 0) & (query_len > 1) & (keys > 1024))
    return tl.where(is_long, 10, 9).to(tl.int32)


@triton.jit
def place_of(key):
    """Return where a key's score, exponential and p lie in its row: keys 16 apart are neighbours.

    So one load has two of the terms that a lane of the sum adds one after the other.
    """
    return (key & -32) | ((key & 15) << 1) | ((key >> 4) & 1)


@triton.jit
def key_at(place):
    """Undo place_of."""
    return (place & -32) | ((place & 1) << 4) | ((place >> 1) & 15)


@triton.jit
def first_of(pair):
    """Return the fp32 at the smaller address of an int64."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def second_of(pair):
    """Return the other fp32 of an int64."""
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_pair(factors, first, second, total):
    """Add a pair to a chain, the odd element first; the two factors, equal for all lanes, travel in one word."""
    return tl.fma(widen_low(factors), first, tl.fma(widen_high(factors), second, total))


@triton.jit
def load_words(ptrs, mask, step: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT words that lie `step` apart: a tuple of tensors, so that all of the loads are under way together."""
    words = ()
    for i in tl.static_range(COUNT):
        words = words + (tl.load(ptrs + i * step, mask=mask),)
    return words


@triton.jit
def warm(ptrs, wanted):
    """Ask the L1 of an NVIDIA GPU for the line behind each pointer; waits for nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred %p; setp.ne.s32 %p, $2, 0; @%p prefetch.global.L1 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [ptrs.to(tl.int64), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pull(ptrs, wanted, BYTES: tl.constexpr):
    """Ask the L2 of a GPU since sm_90 for the BYTES behind each pointer, a multiple of 16; waits for nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred %p; setp.ne.s32 %p, $3, 0; @%p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r", [ptrs.to(tl.int64), tl.full(ptrs.shape, BYTES, tl.int32), wanted.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
