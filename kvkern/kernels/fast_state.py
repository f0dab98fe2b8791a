"""Softmax states and their canonical fold: 256 -> 1,024 -> 4,096 -> 16,384 keys -> all, each step the same operations.

A state is (m_i, l_i, acc): maximum of the scores in base 2, sum of exp2(score - m_i), and the values weighted by it.
Folding the empty state in changes no bit, so a tree with absent children has the bits of the tree without them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAF_TILES = tl.constexpr(4)
FAN = tl.constexpr(4)


@triton.jit
def empty_state(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the state of no key."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    return m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_DIM], tl.float32)


@triton.jit
def finite(m):
    """Return what scores are measured from: 0 where nothing was seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def fold(m_a, l_a, acc_a, m_b, l_b, acc_b):
    """Fold state b into state a."""
    m = tl.maximum(m_a, m_b)
    a, b = tl.exp2(m_a - finite(m)), tl.exp2(m_b - finite(m))
    return m, l_a * a + l_b * b, acc_a * a[:, None] + acc_b * b[:, None]


@triton.jit
def store_state(partial_ptr, first_row, lane, mask, m_i, l_i, acc, total_rows, HEAD_DIM: tl.constexpr):
    """Write states of neighbouring rows; `partial_ptr` is acc [rows, D], then m_i [rows], then l_i [rows], fp32."""
    channel = tl.arange(0, HEAD_DIM)
    acc_ptr, m_ptr = partial_ptr + first_row * HEAD_DIM, partial_ptr + total_rows * HEAD_DIM + first_row
    tl.store(acc_ptr + (lane[:, None] * HEAD_DIM + channel[None, :]), acc, mask=mask[:, None])
    tl.store(m_ptr + lane, m_i, mask=mask)
    tl.store(m_ptr + total_rows + lane, l_i, mask=mask)


@triton.jit
def load_state(partial_ptr, first_row, lane, mask, total_rows, HEAD_DIM: tl.constexpr):
    """Read states past the first cache, which other programs' writes do not reach; empty where masked."""
    channel = tl.arange(0, HEAD_DIM)
    acc_ptr, m_ptr = partial_ptr + first_row * HEAD_DIM, partial_ptr + total_rows * HEAD_DIM + first_row
    place = acc_ptr + (lane[:, None] * HEAD_DIM + channel[None, :])
    acc = tl.load(place, mask=mask[:, None], other=0.0, cache_modifier=".cg")
    m_i = tl.load(m_ptr + lane, mask=mask, other=float("-inf"), cache_modifier=".cg")
    l_i = tl.load(m_ptr + total_rows + lane, mask=mask, other=0.0, cache_modifier=".cg")
    return m_i, l_i, acc


@triton.jit
def fold_units(partial_ptr, row, stride_unit, count, first_unit, most, total_rows,
               UNIT_TILES: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """Fold `count[i]` units of row i up the tree; `first_unit` is where the first of them lies by absolute position."""
    m_i, l_i, acc = empty_state(ROWS, HEAD_DIM)
    m_16k, l_16k, acc_16k = empty_state(ROWS, HEAD_DIM)
    m_4k, l_4k, acc_4k = empty_state(ROWS, HEAD_DIM)
    m_1k, l_1k, acc_1k = empty_state(ROWS, HEAD_DIM)
    per_1k: tl.constexpr = LEAF_TILES * FAN // UNIT_TILES if UNIT_TILES < LEAF_TILES * FAN else 1
    per_4k: tl.constexpr = LEAF_TILES * FAN * FAN // UNIT_TILES
    for unit in tl.range(0, most, num_stages=4):
        m_u, l_u, acc_u = load_state(partial_ptr, unit * stride_unit, row, unit < count, total_rows, HEAD_DIM)
        m_1k, l_1k, acc_1k = fold(m_1k, l_1k, acc_1k, m_u, l_u, acc_u)
        end, is_last = first_unit + unit + 1, unit == most - 1
        if (end % per_1k == 0) | is_last:
            m_4k, l_4k, acc_4k = fold(m_4k, l_4k, acc_4k, m_1k, l_1k, acc_1k)
            m_1k, l_1k, acc_1k = empty_state(ROWS, HEAD_DIM)
        if (end % per_4k == 0) | is_last:
            m_16k, l_16k, acc_16k = fold(m_16k, l_16k, acc_16k, m_4k, l_4k, acc_4k)
            m_4k, l_4k, acc_4k = empty_state(ROWS, HEAD_DIM)
        if (end % (per_4k * FAN) == 0) | is_last:
            m_i, l_i, acc = fold(m_i, l_i, acc, m_16k, l_16k, acc_16k)
            m_16k, l_16k, acc_16k = empty_state(ROWS, HEAD_DIM)
    return m_i, l_i, acc
