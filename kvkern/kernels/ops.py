"""The Triton kernels as torch operators, `torch.ops.kvkern.*`: they write into what they are given, allocating nothing.

`Library.define` and `impl` cost about 2 us a call, `custom_op` ten times that. The CPU implementation is the
interpreter's, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvkern.kernels import fast_door, triton_door

_LIBRARY = torch.library.Library("kvkern", "DEF")
_LIBRARY.define(
    "exact_attention(Tensor q, Tensor pool, Tensor block_table, Tensor prefix_len, Tensor reader_prefix, "
    "Tensor suffix_len, Tensor query_len, Tensor suffix_k, Tensor suffix_v, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor(c!) scratch, int block_tiles, int stride_tile, int layer_offset, float sm_scale, int key_run) -> ()"
)
_LIBRARY.define(
    "fast_attention(Tensor q, Tensor pool, Tensor block_table, Tensor prefix_len, Tensor reader_prefix, "
    "Tensor suffix_len, Tensor query_len, Tensor suffix_k, Tensor suffix_v, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor(c!) workspace, int block_tiles, int stride_tile, int layer_offset, float sm_scale) -> ()"
)
_LIBRARY.define(
    "append(Tensor k, Tensor v, Tensor(a!) suffix_k, Tensor(b!) suffix_v, Tensor first_slot, Tensor count) -> ()"
)


def _exact_attention(
    q: Tensor,
    pool: Tensor,
    block_table: Tensor,
    prefix_len: Tensor,
    reader_prefix: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scratch: Tensor,
    block_tiles: int,
    stride_tile: int,
    layer_offset: int,
    sm_scale: float,
    key_run: int,
) -> None:
    with torch.cuda.device_of(q):  # Triton launches on the current device
        triton_door.attend(
            q, out, lse,
            pool=pool, block_table=block_table, block_tiles=block_tiles, stride_tile=stride_tile,
            layer_offset=layer_offset, prefix_len=prefix_len, reader_prefix=reader_prefix, suffix_len=suffix_len,
            query_len=query_len, suffix_k=suffix_k, suffix_v=suffix_v, sm_scale=sm_scale, key_run=key_run,
            scratch=scratch,
        )  # fmt: skip


def _fast_attention(
    q: Tensor,
    pool: Tensor,
    block_table: Tensor,
    prefix_len: Tensor,
    reader_prefix: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,
    block_tiles: int,
    stride_tile: int,
    layer_offset: int,
    sm_scale: float,
) -> None:
    with torch.cuda.device_of(q):
        fast_door.attend(
            q, out, lse,
            pool=pool, block_table=block_table, block_tiles=block_tiles, stride_tile=stride_tile,
            layer_offset=layer_offset, prefix_len=prefix_len, reader_prefix=reader_prefix, suffix_len=suffix_len,
            query_len=query_len, suffix_k=suffix_k, suffix_v=suffix_v, sm_scale=sm_scale, workspace=workspace,
        )  # fmt: skip


for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("fast_attention", _fast_attention, _key)
    _LIBRARY.impl("exact_attention", _exact_attention, _key)
    _LIBRARY.impl("append", triton_door.append, _key)
torch.library.register_fake("kvkern::exact_attention", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("kvkern::fast_attention", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("kvkern::append", lambda *_: None, lib=_LIBRARY)

exact_attention = torch.ops.kvkern.exact_attention
fast_attention = torch.ops.kvkern.fast_attention
append = torch.ops.kvkern.append
