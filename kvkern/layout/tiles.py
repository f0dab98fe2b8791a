"""Tiles: K and V of a document cut into 64-token tiles, the shape in which kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvkern.errors import LayoutError

TILE_TOKENS = 64
BLOCK_TILES = 4
BLOCK_TOKENS = TILE_TOKENS * BLOCK_TILES


def tiles_for(num_tokens: int) -> int:
    """Number of tiles that hold `num_tokens` tokens."""
    return -(-num_tokens // TILE_TOKENS)


def blocks_for(num_tokens: int) -> int:
    """Number of blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def pack(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Cut K and V into tiles, moving bits and never computing with them.

    Args:
        k: `[layers, kv_heads, n, head_dim]` bf16, after RoPE, any strides.
        v: the same shape and dtype.

    Returns:
        `k_tiles [tiles, layers, kv_heads, head_dim, 64]` (channel-major) and
        `v_tiles [tiles, layers, kv_heads, 64, head_dim]` (token-major), contiguous bf16; the last
        tile is padded with +0.

    Raises:
        LayoutError: wrong rank or dtype, no tokens, or shapes that differ.
    """
    for name, tensor in (("k", k), ("v", v)):
        _require(tensor, name, rank=4)
    if k.shape != v.shape:
        raise LayoutError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    layers, heads, n, head_dim = k.shape
    tiles = tiles_for(n)
    k_tiles = _allocate(k, (tiles, layers, heads, head_dim, TILE_TOKENS), n)
    v_tiles = _allocate(v, (tiles, layers, heads, TILE_TOKENS, head_dim), n)
    _move(k, k_tiles.transpose(3, 4), n, into_tiles=True)
    _move(v, v_tiles, n, into_tiles=True)
    return k_tiles.view(torch.bfloat16), v_tiles.view(torch.bfloat16)


def unpack(k_tiles: Tensor, v_tiles: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`.

    Args:
        k_tiles: `[tiles, layers, kv_heads, head_dim, 64]` bf16.
        v_tiles: `[tiles, layers, kv_heads, 64, head_dim]` bf16.
        n: tokens to give back; the tiles must hold exactly that many, padding aside.

    Returns:
        `k` and `v`, `[layers, kv_heads, n, head_dim]` bf16, contiguous.

    Raises:
        LayoutError: wrong rank or dtype, or shapes that do not belong together.
    """
    for name, tensor in (("k_tiles", k_tiles), ("v_tiles", v_tiles)):
        _require(tensor, name, rank=5)
    tiles, layers, heads, head_dim, width = k_tiles.shape
    if width != TILE_TOKENS or v_tiles.shape != (tiles, layers, heads, width, head_dim):
        raise LayoutError(
            f"k_tiles {tuple(k_tiles.shape)} and v_tiles {tuple(v_tiles.shape)} do not belong "
            "together: they must be [tiles, layers, kv_heads, head_dim, 64] and "
            "[tiles, layers, kv_heads, 64, head_dim]"
        )
    if n < 1 or tiles_for(n) != tiles:
        raise LayoutError(f"n is {n}, but {tiles} tiles hold {64 * tiles - 63} to {64 * tiles} tokens")
    k, v = (torch.empty((layers, heads, n, head_dim), dtype=torch.int16, device=t.device) for t in (k_tiles, v_tiles))
    _move(k, k_tiles.view(torch.int16).transpose(3, 4), n, into_tiles=False)
    _move(v, v_tiles.view(torch.int16), n, into_tiles=False)
    return k.view(torch.bfloat16), v.view(torch.bfloat16)


def require_finite_kv(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse K or V that is not a finite bf16 tensor of the given shape.

    Args:
        name: what to call the tensor in the message, `k` or `v`.
        tensor: anything.
        shape: the shape that spec and token ids require, `[layers, kv_heads, n, head_dim]`.

    Raises:
        LayoutError: it is not; the message says how and, for NaN and infinity, where.
    """
    _require(tensor, name, rank=4)
    if tuple(tensor.shape) != shape:
        raise LayoutError(
            f"{name} has shape {tuple(tensor.shape)}; spec and token_ids require {shape}, "
            "[layers, kv_heads, tokens, head_dim]"
        )
    low, high = torch.aminmax(tensor.detach())  # one pass; NaN wins both
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        where = (~torch.isfinite(tensor.detach())).nonzero()[0].tolist()
        raise LayoutError(
            f"{name} holds NaN or infinity, first at [layer, head, token, channel] = {where}; "
            "such a cache is never published. Check the prefill."
        )


def _require(tensor: Tensor, name: str, rank: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bfloat16:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise LayoutError(f"{name} must be a torch.bfloat16 tensor, got {given}; use a bf16 model")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise LayoutError(f"{name} must be a dense tensor with data, got {tensor.layout} on {tensor.device}")
    if tensor.dim() != rank or tensor.numel() == 0:
        raise LayoutError(f"{name} must have {rank} non-empty dimensions, got {tuple(tensor.shape)}")


def _allocate(like: Tensor, shape: tuple[int, ...], n: int) -> Tensor:
    tiles = torch.empty(shape, dtype=torch.int16, device=like.device)
    if n % TILE_TOKENS:
        tiles[-1].zero_()
    return tiles


def _move(rows: Tensor, tiles: Tensor, n: int, *, into_tiles: bool) -> None:
    """Copy between rows `[layers, heads, n, dim]` and tiles `[tiles, layers, heads, 64, dim]`."""
    rows, full, rest = rows.detach().view(torch.int16), n // TILE_TOKENS, n % TILE_TOKENS
    body = rows[:, :, : n - rest].unflatten(2, (full, TILE_TOKENS)).permute(2, 0, 1, 3, 4)
    pairs = [(tiles[:full], body)]
    if rest:
        pairs.append((tiles[full, :, :, :rest], rows[:, :, n - rest :]))
    for tile_part, row_part in pairs:
        if into_tiles:
            tile_part.copy_(row_part)
        else:
            row_part.copy_(tile_part)
