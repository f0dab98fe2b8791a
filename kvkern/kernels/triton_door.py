"""The door to the Triton kernels: devices, scratch, launches. Calls neither allocate nor validate nor synchronise."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import append as append_module
from kvkern.kernels import exact
from kvkern.kernels.exact import ScratchLayout, launch, scratch_layout
from kvkern.kernels.exact_tickets import COUNTERS
from kvkern.kernels.launch_config import ExactConfig, exact_config

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def architecture(device: torch.device) -> str:
    """Name a device as the configurations do; a CPU stands for the interpreter."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").partition(":")[0]
    return name or f"sm{properties.major}{properties.minor}"


def is_interpreted() -> bool:
    """Whether Triton runs in its interpreter, which reads CPU tensors: for tests."""
    return not isinstance(exact.exact_kernel, triton.JITFunction)


def require_available(device: torch.device) -> None:
    """Refuse a device that the Triton kernels do not run on.

    Raises:
        UnsupportedError: a CPU outside the interpreter, or an architecture without a configuration.
    """
    if device.type == "cpu" and not is_interpreted():
        raise UnsupportedError(
            "backend 'triton' reads GPU memory; on a CPU it runs in Triton's interpreter only, for tests: set "
            "TRITON_INTERPRET=1 before kvkern is imported, or take backend 'c'"
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"backend 'triton' does not run on {device.type!r}: move the tensors to 'cuda'")
    config_for(device)


def scratch_bytes(q: Tensor, block_table: Tensor, block_tiles: int, suffix_k: Tensor, bound_bytes: int) -> int:
    """Bytes of scratch for a call: of as many query positions as fit the bound, but of one at least.

    Not the bound itself: calls of other shapes should need other sizes, so that `require_workspace` tells them apart.
    """
    batch, heads, rows, head_dim = q.shape
    tiles = block_table.shape[1] * block_tiles + suffix_k.shape[2]
    need = partial(scratch_layout, head_dim=head_dim, tile_capacity=tiles, config=config_for(q.device))
    return need(batch * heads * _slice_len(need, batch * heads, max(rows, 1), bound_bytes)).nbytes


def _slice_len(need: Callable[[int], ScratchLayout], position_rows: int, positions: int, nbytes: int) -> int:
    """Return how many query positions run at once, so that their scratch fits; 1 if none do."""
    while positions > 1 and need(position_rows * positions).nbytes > nbytes:
        positions = -(-positions // 2)
    return positions


def new_workspace(q: Tensor, need: int) -> Tensor:
    """Return `need` bytes of scratch with its counters at 0; it allocates."""
    workspace = torch.empty(need, dtype=torch.uint8, device=q.device)
    workspace[: 4 * COUNTERS.value * q.shape[0] * q.shape[1] * q.shape[2]].zero_()
    return workspace


def require_workspace(workspace: Tensor, need: int, device: torch.device) -> None:
    """Refuse work space of other shapes or from elsewhere: what one call leaves may lie on another's counters.

    Raises:
        LayoutError: saying what is needed.
    """
    is_fit = workspace.numel() == need and workspace.dtype == torch.uint8 and workspace.device == device
    if not is_fit or not workspace.is_contiguous() or workspace.data_ptr() % 16:
        raise LayoutError(
            f"workspace is {workspace.numel()} of {workspace.dtype} on {workspace.device}; it must be {need} "
            f"of torch.uint8 on {device}, contiguous on a 16-byte boundary: what new_workspace returns for these shapes"
        )


def append(k: Tensor, v: Tensor, suffix_k: Tensor, suffix_v: Tensor, first_slot: Tensor, count: Tensor) -> None:
    """Write the last `count[b]` of each reader's new tokens into its suffix tiles; arguments as in `native.append`."""
    batch, heads, tokens, head_dim = k.shape
    if k.numel() == 0:
        return
    with torch.cuda.device_of(k):
        append_module.append_kernel[(tokens, heads, batch)](
            k.view(torch.int16), v.view(torch.int16), first_slot, count,
            suffix_k.view(torch.int16), suffix_v.view(torch.int16),
            *k.stride()[:3], *v.stride()[:3], *suffix_k.stride()[:3], tokens,
            HEAD_DIM=head_dim, LANES=1 << (head_dim - 1).bit_length(), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def config_for(device: torch.device) -> ExactConfig:
    """Return the launch configuration of a device."""
    return exact_config(architecture(device))


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
    key_run: int,
    scratch: Tensor,
    config: ExactConfig | None = None,
) -> None:
    """Attend under contract part A; arguments as in `native.attend` and `native.attention_keys`, and two more.

    `scratch`, uint8: its counters, which come first, are 0 on entry and on return, whether the launch ends or is
    aborted. Tq is split so that each slice fits; one query position of all readers must fit. Launches that may overlap
    need scratch of their own. `config`: another launch configuration; no bit depends on it.
    """
    config = config or config_for(q.device)
    batch, num_q_heads, max_query_len, head_dim = q.shape
    tile_capacity = block_table.shape[1] * block_tiles + suffix_k.shape[2]
    position_rows = batch * num_q_heads
    if batch == 0 or max_query_len == 0:
        return
    need = partial(scratch_layout, head_dim=head_dim, tile_capacity=tile_capacity, config=config)
    slice_len = _slice_len(need, position_rows, max_query_len, scratch.numel())
    if need(position_rows * slice_len).nbytes > scratch.numel():
        raise LayoutError(
            f"scratch is {scratch.numel()} bytes; it must be at least {need(position_rows).nbytes}, what one query "
            "position of all readers needs"
        )
    lengths = (prefix_len, reader_prefix, suffix_len, query_len)
    place = (block_table, block_tiles, stride_tile, layer_offset)
    layout = need(position_rows * slice_len)  # of all slices: the last one's may have fewer rows, and uses it in part
    try:
        for first_query in range(0, max_query_len, slice_len):
            queries = (first_query, min(slice_len, max_query_len - first_query))
            launch(
                q, out, lse, lengths, pool, place, suffix_k, suffix_v, scratch, layout, queries, sm_scale, key_run,
                config,
            )  # fmt: skip
    except BaseException:
        with torch.inference_mode():  # the scratch may have been made under it
            scratch[: layout.counter_bytes].zero_()
        raise
