"""Append in Triton: new tokens go into suffix tiles, K channel-major, V token-major. Moves bits, computes nothing."""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(64)


@triton.jit
def append_kernel(
    k_ptr,  # [B, Hkv, T, D] int16
    v_ptr,  # the same
    first_slot_ptr,  # [B] int32, place of the first written token in the suffix tiles
    count_ptr,  # [B] int32, tokens written: the last ones of the T
    suffix_k_ptr,  # [B, Hkv, tiles, D, 64] int16
    suffix_v_ptr,  # [B, Hkv, tiles, 64, D] int16
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_st: tl.int64,
    max_count,
    HEAD_DIM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write one token of one head of one reader."""
    token, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = token - (max_count - tl.load(count_ptr + b))
    if index >= 0:
        slot = tl.load(first_slot_ptr + b) + index
        channel = tl.arange(0, LANES)
        inside = channel < HEAD_DIM
        k = tl.load(k_ptr + b * stride_kb + kv_head * stride_kh + token * stride_kt + channel, mask=inside)
        v = tl.load(v_ptr + b * stride_vb + kv_head * stride_vh + token * stride_vt + channel, mask=inside)
        tile = b * stride_sb + kv_head * stride_sh + (slot // TILE) * stride_st
        tl.store(suffix_k_ptr + tile + channel * TILE + slot % TILE, k, mask=inside)
        tl.store(suffix_v_ptr + tile + (slot % TILE) * HEAD_DIM + channel, v, mask=inside)
