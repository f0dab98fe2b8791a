"""The run sums of a Linear over many rows: a block of rows by channels in registers, bound by its fused multiply-adds.

Every output is one chain, so there is no tl.dot: each loaded weight meets ROWS x, and each x the channels of a lane. x
is equal for all lanes; it is widened and laid out once, `pack`, so that a pair of k of one row is one 64-bit load, a
block's loads lie side by side, and the block itself widens weights alone. Bits and layout of the run sums are those of
linear.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kvkern.kernels.primitives import load_rows, widen_high, widen_low

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ModelConfig


@triton.jit
def pack_kernel(
    x_ptr,  # [rows, in / 2] words of two k
    packed_ptr,  # [blocks, pairs, ROWS] int64: fp32 of k below, of k + 1 above
    stride_x: tl.int64, rows: tl.int64,
    pairs,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Widen PAIRS pairs of k of ROWS rows; rows past the end repeat the last."""
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)[:, None]
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :], rows - 1)
    inside = pair + row * 0 < pairs
    x = tl.load(x_ptr + row * stride_x + pair, mask=inside, other=0)
    packed = ((x << 16).to(tl.int64) & 0xFFFFFFFF) | ((x & -65536).to(tl.int64) << 32)
    place = (tl.program_id(0).to(tl.int64) * pairs + pair) * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(packed_ptr + place, packed, mask=inside)


@triton.jit
def block_kernel(
    packed_ptr,  # [blocks, pairs, ROWS] int64
    weight_ptr,  # [in, out / 2] words of two channels
    partial_ptr,  # [runs, rows, 2, words] fp32, even channels and odd
    stride_w: tl.int64, rows: tl.int64,  # words
    inputs, words,
    ROWS: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Chain ROWS rows of x and 2 * WORDS channels over one run of k; UNROLL k of the weight are under way."""
    first_row, first = tl.program_id(0) * ROWS, tl.program_id(2) * RUN
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    count = tl.minimum(inputs - first, RUN)
    whole = count // UNROLL * UNROLL
    x_ptr = packed_ptr + (tl.program_id(0).to(tl.int64) * ((inputs + 1) // 2) + first // 2) * ROWS
    w_ptrs = weight_ptr + first * stride_w + word
    even = ()
    odd = ()
    for _ in tl.static_range(ROWS):
        even = even + (tl.zeros([WORDS], tl.float32),)
        odd = odd + (tl.zeros([WORDS], tl.float32),)
    w = load_rows(w_ptrs, inside & (word * 0 < whole), stride_w, UNROLL)
    x = _x_of_pair(x_ptr, ROWS)
    for start in range(0, whole, UNROLL):  # x is one pair ahead; each pair of w is replaced by the next trip's
        w_ptrs += UNROLL * stride_w
        has_more = inside & (word * 0 + start + UNROLL < whole)
        upcoming = ()
        for i in tl.static_range(UNROLL // 2):
            x_ptr += ROWS
            next_x = _x_of_pair(x_ptr, ROWS)  # behind the last pair, what nobody uses
            even = _add_pair(x, widen_low(w[2 * i]), widen_low(w[2 * i + 1]), even, ROWS)
            odd = _add_pair(x, widen_high(w[2 * i]), widen_high(w[2 * i + 1]), odd, ROWS)
            upcoming = upcoming + load_rows(w_ptrs + 2 * i * stride_w, has_more, stride_w, 2)
            x = next_x
        w = upcoming
    for k in range(whole, count - 1, 2):  # what a trip does not cover
        pair = load_rows(weight_ptr + (first + k) * stride_w + word, inside, stride_w, 2)
        x = _x_of_pair(x_ptr, ROWS)
        even = _add_pair(x, widen_low(pair[0]), widen_low(pair[1]), even, ROWS)
        odd = _add_pair(x, widen_high(pair[0]), widen_high(pair[1]), odd, ROWS)
        x_ptr += ROWS
    for k in range(count - count % 2, count):  # a single last k stands alone
        last = tl.load(weight_ptr + (first + k) * stride_w + word, mask=inside)
        next_even = ()
        next_odd = ()
        for r in tl.static_range(ROWS):
            x_last = tl.load(x_ptr + r).to(tl.int32).to(tl.float32, bitcast=True)
            next_even = next_even + (tl.fma(x_last, widen_low(last), even[r]),)
            next_odd = next_odd + (tl.fma(x_last, widen_high(last), odd[r]),)
        even = next_even
        odd = next_odd
    for r in tl.static_range(ROWS):
        if first_row + r < rows:
            place = (tl.program_id(2) * rows + first_row + r) * (2 * words) + word
            tl.store(partial_ptr + place, even[r], mask=inside)
            tl.store(partial_ptr + place + words, odd[r], mask=inside)


@triton.jit
def _x_of_pair(x_ptr, ROWS: tl.constexpr):
    """Load a pair of k of every row."""
    x = ()
    for r in tl.static_range(ROWS):
        x = x + (tl.load(x_ptr + r),)
    return x


@triton.jit
def _add_pair(x, first, second, totals, ROWS: tl.constexpr):
    """Add a pair of k to the chains of all rows."""
    added = ()
    for r in tl.static_range(ROWS):
        x_first = x[r].to(tl.int32).to(tl.float32, bitcast=True)
        x_second = (x[r] >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        added = added + (_chain(x_first, first, x_second, second, totals[r]),)
    return added


@triton.jit
def _chain(x_first, first, x_second, second, total):
    """Add a pair to a chain, the odd element first."""
    return tl.fma(x_first, first, tl.fma(x_second, second, total))


def launch_block(
    x: Tensor, weight_words: Tensor, partial: Tensor, packed: Tensor, inputs: int, run: int, config: ModelConfig
) -> None:
    """Write the run sums of all rows and channels.

    Args:
        x: `[rows, in / 2]` int32, words of two k.
        weight_words: `[in, out / 2]` int32, words of two channels.
        partial: `[runs, rows, 2, words]` fp32, written.
        packed: int64 scratch, one a pair of k and row, rows rounded up to whole blocks; and one block's rows more.
        inputs: k, which may be odd.
        run: k of one chain.
        config: how to launch; no bit depends on it.
    """
    rows, pairs = x.shape
    words = weight_words.shape[1]
    block, block_words, unroll, warps = config.many
    blocks = -(-rows // block)
    strict = {"enable_fp_fusion": False}
    pack_kernel[(blocks, -(-pairs // config.pack_pairs))](
        x, packed, x.stride(0), rows, pairs, ROWS=block, PAIRS=config.pack_pairs, num_warps=config.pack_warps, **strict
    )
    block_kernel[(blocks, -(-words // block_words), -(-inputs // run))](
        packed, weight_words, partial, weight_words.stride(0), rows, inputs, words,
        ROWS=block, WORDS=block_words, UNROLL=unroll, RUN=run, num_warps=warps, **strict,
    )  # fmt: skip
