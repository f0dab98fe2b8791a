"""Linear in Triton: contract B1.

    runs   one fp32 chain per (row, channel, run of k)   a program: some rows, some channels, one run
    fold   run sums added left to right, RNE16           a program: one row, some channels

Bits depend on a row of x and a channel's weights alone. The weight is read k-major: output channels are lanes, so lanes
never meet, and two neighbouring channels travel in one 32-bit word, as two neighbouring k of x do. Few rows are bound
by the weight's bytes: a program of `runs` here has many k of few channels under way. Many rows have their runs in
linear_many.py. Rows are tuples of tensors over lanes and x is scalar, for the reason given in exact.py. Critical path:
512 or 1,024 dependent fmas, then one add per run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvkern.contract import LINEAR_LONG_ABOVE, LINEAR_RUN, LINEAR_RUN_LONG
from kvkern.errors import LayoutError
from kvkern.kernels.linear_many import launch_block
from kvkern.kernels.primitives import load_rows, rounded_bits, widen_high, widen_low

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.kernels.launch_config import ModelConfig


@triton.jit
def runs_kernel(
    x_ptr,  # [rows, in / 2] words of two k
    weight_ptr,  # [in, out / 2] words of two channels
    partial_ptr,  # [runs, rows, 2, words] fp32, even channels and odd
    stride_x: tl.int64, stride_w: tl.int64,  # words
    rows: tl.int64, inputs, words,
    ROWS: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Chain ROWS rows of x and 2 * WORDS channels over one run of k; UNROLL k are loaded together."""
    first_row, first = tl.program_id(0) * ROWS, tl.program_id(2) * RUN
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    count = tl.minimum(inputs - first, RUN)
    whole = count // UNROLL * UNROLL
    x_starts = ()
    even = ()
    odd = ()
    for r in tl.static_range(ROWS):
        x_starts = x_starts + (x_ptr + tl.minimum(first_row + r, rows - 1) * stride_x + first // 2,)
        even = even + (tl.zeros([WORDS], tl.float32),)
        odd = odd + (tl.zeros([WORDS], tl.float32),)
    w_ptrs = weight_ptr + first * stride_w + word
    w = load_rows(w_ptrs, inside & (word * 0 < whole), stride_w, UNROLL)
    # Each pair is replaced by the next trip's once it is used: UNROLL k are always under way. Unrolled further, the
    # compiler would delay their loads.
    for start in range(0, whole, UNROLL):
        w_ptrs += UNROLL * stride_w
        has_more = inside & (word * 0 + start + UNROLL < whole)
        upcoming = ()
        for i in tl.static_range(UNROLL // 2):
            even, odd = _add_pair(x_starts, start // 2 + i, w[2 * i], w[2 * i + 1], even, odd, ROWS)
            upcoming = upcoming + load_rows(w_ptrs + 2 * i * stride_w, has_more, stride_w, 2)
        w = upcoming
    for k in range(whole, count - 1, 2):  # what a trip does not cover; adding zeros would turn -0 into +0
        pair = load_rows(weight_ptr + (first + k) * stride_w + word, inside, stride_w, 2)
        even, odd = _add_pair(x_starts, k // 2, pair[0], pair[1], even, odd, ROWS)
    for k in range(count - count % 2, count):  # a single last k stands alone
        last = tl.load(weight_ptr + (first + k) * stride_w + word, mask=inside)
        next_even = ()
        next_odd = ()
        for r in tl.static_range(ROWS):
            x = widen_low(tl.load(x_starts[r] + k // 2))
            next_even = next_even + (tl.fma(x, widen_low(last), even[r]),)
            next_odd = next_odd + (tl.fma(x, widen_high(last), odd[r]),)
        even = next_even
        odd = next_odd
    for r in tl.static_range(ROWS):
        if first_row + r < rows:
            place = (tl.program_id(2) * rows + first_row + r) * (2 * words) + word
            tl.store(partial_ptr + place, even[r], mask=inside)
            tl.store(partial_ptr + place + words, odd[r], mask=inside)


@triton.jit
def fold_kernel(
    partial_ptr,  # [runs, rows, 2, words] fp32
    out_ptr,  # [rows, out] int16
    stride_o: tl.int64, rows: tl.int64,
    outputs, words, runs,
    WORDS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Add the run sums of one row, left to right, and round; RUNS of them are loaded together."""
    row, word = tl.program_id(0).to(tl.int64), tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    for half in tl.static_range(2):  # even channels, then odd
        channel = 2 * word + half
        inside = channel < outputs
        ptrs = partial_ptr + (row * 2 + half) * words + word
        total = tl.load(ptrs, mask=inside, other=0.0)
        for first in range(1, runs, RUNS):
            sums = ()
            for i in tl.static_range(RUNS):
                there = inside & (word * 0 + first + i < runs)
                sums = sums + (tl.load(ptrs + (first + i) * (rows * 2 * words), mask=there, other=0.0),)
            for i in tl.static_range(RUNS):
                total = tl.where(word * 0 + first + i < runs, total + sums[i], total)
        tl.store(out_ptr + row * stride_o + channel, rounded_bits(total).to(tl.int16), mask=inside)


@triton.jit
def _add_pair(x_starts, place, first, second, even, odd, ROWS: tl.constexpr):
    """Add a pair of k to every row's chains; the two x of a row, equal for all lanes, travel in one word."""
    first_even, second_even = widen_low(first), widen_low(second)
    first_odd, second_odd = widen_high(first), widen_high(second)
    next_even = ()
    next_odd = ()
    for r in tl.static_range(ROWS):
        x = tl.load(x_starts[r] + place)
        x_first, x_second = widen_low(x), widen_high(x)
        next_even = next_even + (_chain(x_first, first_even, x_second, second_even, even[r]),)
        next_odd = next_odd + (_chain(x_first, first_odd, x_second, second_odd, odd[r]),)
    return next_even, next_odd


@triton.jit
def _chain(x_first, first, x_second, second, total):
    """Add a pair to a chain, the odd element first."""
    return tl.fma(x_first, first, tl.fma(x_second, second, total))


def run_length(inputs: int) -> int:
    """Return how many k one chain takes."""
    return LINEAR_RUN if inputs <= LINEAR_LONG_ABOVE else LINEAR_RUN_LONG


def scratch_floats(rows: int, weight: Tensor, config: ModelConfig) -> int:
    """Return the fp32 of scratch for `rows` rows at once: run sums, and what linear_many.py lays out anew."""
    outputs, inputs = weight.shape
    sums = rows * -(-inputs // run_length(inputs)) * (outputs + outputs % 2)
    if rows <= config.few_rows:
        return sums
    block = config.many[0]
    return sums + 2 * block * (-(-rows // block) * ((inputs + 1) // 2) + 1)


def launch_linear(x: Tensor, weight: Tensor, out: Tensor, scratch: Tensor, config: ModelConfig) -> None:
    """Compute `out = x @ weight.T` under B1.

    Args:
        x: `[rows, in]` bf16, `in` rounded up to even; rows begin on 4-byte boundaries.
        weight: `[out, in]` bf16, k-major; rows of k begin on 4-byte boundaries, and an odd `out` has a place behind it.
        out: `[rows, out]` bf16, innermost axis dense, written.
        scratch: fp32; rows are split so that each slice fits, and one row must.
        config: how to launch; no bit depends on it.
    """
    rows, have = x.shape[0], scratch.numel()
    while rows > 1 and scratch_floats(rows, weight, config) > have:
        rows = -(-rows // 2)
    if scratch_floats(rows, weight, config) > have:
        raise LayoutError(f"scratch is {have} fp32; it must be at least {scratch_floats(1, weight, config)}, one row's")
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        launch_runs(x[part], weight, scratch, config)
        launch_fold(scratch, out[part], weight.shape[1], config)


def launch_runs(x: Tensor, weight: Tensor, scratch: Tensor, config: ModelConfig) -> None:
    """Write the run sums of every row and channel, `[runs, rows, 2, words]`; arguments as in `launch_linear`."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    words, run = (outputs + 1) // 2, run_length(inputs)
    runs = -(-inputs // run)
    x_words = x.view(torch.int32)
    weight_words = weight.as_strided((inputs, 2 * words), (weight.stride(1), 1)).view(torch.int32)
    if rows > config.few_rows:
        packed = scratch[2 * runs * rows * words : scratch.numel() // 2 * 2].view(torch.int64)
        launch_block(x_words, weight_words, scratch, packed, inputs, run, config)
        return
    most, few_words, unroll, warps = config.few
    few = min(most, 1 << (rows - 1).bit_length())  # no more rows than a power of two needs
    runs_kernel[(-(-rows // few), -(-words // few_words), runs)](
        x_words, weight_words, scratch, x_words.stride(0), weight_words.stride(0), rows, inputs, words,
        ROWS=few, WORDS=few_words, UNROLL=unroll, RUN=run, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def launch_fold(scratch: Tensor, out: Tensor, inputs: int, config: ModelConfig) -> None:
    """Add the run sums and round; arguments as in `launch_linear`."""
    rows, outputs = out.shape
    words = (outputs + 1) // 2
    fold_kernel[(rows, -(-words // config.fold_words))](
        scratch, out.view(torch.int16), out.stride(0), rows, outputs, words, -(-inputs // run_length(inputs)),
        WORDS=config.fold_words, RUNS=config.fold_runs, num_warps=config.fold_warps, enable_fp_fusion=False,
    )  # fmt: skip
