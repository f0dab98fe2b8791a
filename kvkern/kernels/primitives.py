"""Contract arithmetic for Triton: widening, rounding by integers, exp_c, log, order keys, strict sums; loads ahead.

Every operation here is one IEEE operation or integer work, so that a launch with `enable_fp_fusion=False` has the bits
of csrc_ref/arith.h by construction. Nothing here may call `tl.exp`, `tl.dot`, `/` or a cast to bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvkern import contract

LOG2E = tl.constexpr(contract.EXP_LOG2E)
MINUS_LN2_HI = tl.constexpr(-contract.EXP_LN2_HI)
MINUS_LN2_LO = tl.constexpr(-contract.EXP_LN2_LO)
C6 = tl.constexpr(contract.EXP_C6)
C5 = tl.constexpr(contract.EXP_C5)
C4 = tl.constexpr(contract.EXP_C4)
C3 = tl.constexpr(contract.EXP_C3)
C2 = tl.constexpr(contract.EXP_C2)
C1 = tl.constexpr(contract.EXP_C1)
EXP_MIN = tl.constexpr(contract.EXP_MIN)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even, below 2^22."""
INFINITY_KEY = tl.constexpr(0x7F800000)
MINUS_INFINITY_KEY = tl.constexpr(-0x7F800001)
NAN_KEY = tl.constexpr(0x7FC00000)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def widen_low(pair):
    """Return the lower bf16 of a 32-bit word, the one at the smaller address, as fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def widen_high(pair):
    """Return the upper bf16 of a 32-bit word as fp32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def widen16(bits):
    """Return a bf16, given as int16, as fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round16(value):
    """RNE16, kept in fp32."""
    bits = value.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def high_half(value):
    """Return the bf16 bits of a value that round16 has made, in the low half of an int32."""
    return (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF


@triton.jit
def rounded_bits(value):
    """RNE16 as an int32, NaN as 0x7fc0: a GPU makes the NaN 0x7fffffff, which rounding would carry over into -0."""
    return tl.where(value != value, 0x7FC0, high_half(round16(value)))


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_c(x):
    """A6: exp(x) for x <= 0."""
    clamped = tl.where(x < EXP_MIN, EXP_MIN, x)
    n = (clamped * LOG2E + ROUNDER) - ROUNDER
    s = tl.fma(n, tl.full(n.shape, MINUS_LN2_HI, tl.float32), clamped)
    s = tl.fma(n, tl.full(n.shape, MINUS_LN2_LO, tl.float32), s)
    u = tl.full(n.shape, C6, tl.float32)
    u = tl.fma(u, s, tl.full(n.shape, C5, tl.float32))
    u = tl.fma(u, s, tl.full(n.shape, C4, tl.float32))
    u = tl.fma(u, s, tl.full(n.shape, C3, tl.float32))
    u = tl.fma(u, s, tl.full(n.shape, C2, tl.float32))
    u = tl.fma(u, s, tl.full(n.shape, C1, tl.float32))
    u = 1.0 + tl.fma(s * s, u, s)
    whole = n.to(tl.int32)
    half = whole >> 1
    u = (u * power_of_two(half)) * power_of_two(whole - half)
    return tl.where(x < EXP_MIN, 0.0, u)


@triton.jit
def order_key(bits):
    """Return an integer in the order of the float whose bits are given; every NaN lies above +infinity."""
    is_nan = (bits & 0x7FFFFFFF) > INFINITY_KEY
    return tl.where(is_nan, NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_order_key(key):
    """Undo order_key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def halve16(lanes):
    """A4: lane[z] += lane[z + h] for h = 8, 4, 2, 1. Each sum runs over an axis of two: one commutative addition."""
    lanes = tl.sum(tl.reshape(lanes, (2, 8)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 4)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 2)), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def log_n(x):
    """Natural logarithm of a normal x >= 1, to about 1 ulp; not part of the contract."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa then lies between sqrt(1/2) and sqrt(2)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    z = s * s
    series = 0.2857142857 + z * 0.2222222222
    series = 0.4 + z * series
    series = 0.6666666667 + z * series
    return exponent.to(tl.float32) * LN2 + (s + s + s * z * series)


@triton.jit
def load_rows(ptrs, mask, stride, COUNT: tl.constexpr):
    """Load COUNT rows of words: a tuple of tensors, so that all of the loads are under way together."""
    words = ()
    for _ in tl.static_range(COUNT):
        words = words + (tl.load(ptrs, mask=mask),)
        ptrs += stride
    return words
