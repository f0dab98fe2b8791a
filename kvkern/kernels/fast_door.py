"""The door to the fast kernel: work space and the one launch. Allocates nothing, never synchronises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvkern.contract import TILE_TOKENS
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import fast, triton_door
from kvkern.kernels.fast_plan import FastPlan, FastShape, plan
from kvkern.kernels.launch_config import FastConfig, fast_config
from kvkern.kernels.triton_door import require_workspace

LAUNCHES = 1
"""Kernel launches of one fast call of one layer."""
HEAD_DIMS = (64, 128)
LOG2E = math.log2(math.e)
GRAIN = 32


def config_for(device: torch.device) -> FastConfig:
    """Return the launch configuration of a device."""
    return fast_config(triton_door.architecture(device))


def plan_for(q: Tensor, block_table: Tensor, block_tiles: int, suffix_k: Tensor) -> FastPlan:
    """Return the plan of a call; it depends on shapes and device alone."""
    batch, num_q_heads, rows, head_dim = q.shape
    heads = suffix_k.shape[1]
    prefixes, max_blocks = block_table.shape[:2]
    shape = FastShape(batch, prefixes, heads, num_q_heads // heads, rows, head_dim, max_blocks * block_tiles,
                      suffix_k.shape[2])  # fmt: skip
    return plan(shape, config_for(q.device))


def workspace_bytes(made: FastPlan) -> int:
    """Bytes of work space: the counters, which must be 0, then the states."""
    return -(-4 * made.counters // 256) * 256 + made.partial_bytes


def require_available(device: torch.device) -> None:
    """Refuse a device that the fast kernel does not run on.

    Raises:
        UnsupportedError: a CPU outside Triton's interpreter, or an architecture without a configuration.
    """
    if device.type == "cpu" and not triton_door.is_interpreted():
        raise UnsupportedError(
            "profile 'fast' computes with a GPU's tensor cores: move the tensors to 'cuda', or take profile 'exact'"
        )
    triton_door.require_available(device)


def require_supported(q: Tensor, block_table: Tensor, block_tiles: int, suffix_k: Tensor, pool: Tensor) -> None:
    """Refuse what the fast kernel does not compute; reads the block table.

    Raises:
        UnsupportedError: another head_dim or block than it is made for.
        LayoutError: tiles that its wide loads and 32-bit counts of 64 bytes do not reach.
    """
    if q.shape[3] not in HEAD_DIMS:
        raise UnsupportedError(f"head_dim is {q.shape[3]}: profile 'fast' computes 64 and 128, take profile 'exact'")
    if block_tiles % 4:
        raise UnsupportedError(f"block_tiles is {block_tiles}: profile 'fast' needs blocks of whole 256-token leaves")
    for name, tensor in (("q", q), ("suffix_k", suffix_k), ("pool", pool)):
        strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides):
            raise LayoutError(
                f"{name} is at address {tensor.data_ptr():#x} with strides {tuple(tensor.stride())}; it must be on a "
                "16-byte boundary with strides of whole 16 bytes for profile 'fast'"
            )
    reach = GRAIN << 31 if q.device.type != "cpu" else 1 << 62
    if block_table.numel() and bool(((block_table % GRAIN != 0) | (block_table.abs() >= reach)).any()):
        raise LayoutError(
            f"block_table is {block_table.tolist()}; it must be multiples of {GRAIN} elements within {reach} of the "
            "pool for profile 'fast'"
        )


def new_workspace(q: Tensor, need: int) -> Tensor:
    """Return `need` bytes of work space with its counters at 0; it allocates."""
    return torch.zeros(need, dtype=torch.uint8, device=q.device)


def attend(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    pool: Tensor,
    block_table: Tensor,
    block_tiles: int,
    stride_tile: int,
    layer_offset: int,
    prefix_len: Tensor,
    reader_prefix: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    sm_scale: float,
    workspace: Tensor,
) -> None:
    """Attend in one launch; arguments as in `triton_door.attend`.

    `workspace`, uint8, `workspace_bytes`: its counters are 0 on entry and on return, whether the launch ends
    or is aborted. Launches that may overlap need work spaces of their own.

    Raises:
        LayoutError: the work space is too small, or misaligned.
    """
    batch, num_q_heads, max_query_len, head_dim = q.shape
    if batch == 0 or max_query_len == 0:
        return
    config = config_for(q.device)
    made = plan_for(q, block_table, block_tiles, suffix_k)
    need = workspace_bytes(made)
    require_workspace(workspace, need, q.device)
    counters = workspace[: need - made.partial_bytes].view(torch.int32)
    partial = workspace[need - made.partial_bytes : need].view(torch.float32)
    widen = q.device.type == "cpu"
    tensors = (x.view(torch.int16) if widen else x for x in (q, pool, suffix_k, suffix_v))
    try:
        fast.fast_kernel[(made.head_programs, suffix_k.shape[1])](
            *tensors, block_table, prefix_len, reader_prefix, suffix_len, query_len,
            partial, counters, out.view(torch.int16), partial if lse is None else lse,
            *q.stride()[:3], *suffix_k.stride()[:3], stride_tile, layer_offset, *out.stride()[:3],
            batch, block_table.shape[0], made.search_steps, block_table.shape[1], max_query_len,
            made.per_block, made.parts, made.row_blocks, made.prefix_units, made.suffix_units, made.prefix_programs,
            made.partial_rows, sm_scale * LOG2E,
            KV_HEADS=suffix_k.shape[1], GROUP=num_q_heads // suffix_k.shape[1], HEAD_DIM=head_dim,
            BLOCK_TILES=block_tiles, BLOCK_M=config.block_m, UNIT_TILES=made.unit_tokens // TILE_TOKENS,
            FOLD_ROWS=config.fold_rows, STAGES=config.stages, HAS_LSE=lse is not None, WIDEN=widen,
            num_warps=config.warps, enable_fp_fusion=False, **config.options,
        )  # fmt: skip
    except BaseException:
        counters.zero_()
        raise
