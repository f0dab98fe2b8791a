"""Build a KVView in which prefixes lie in scattered blocks, from dense keys and values."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from kvkern.layout import BLOCK_TILES, BLOCK_TOKENS, TILE_TOKENS, pack
from kvkern.view import KVView


def random_qkv(
    batch: int, group: int, kv_heads: int, rows: int, columns: int, head_dim: int, spread: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q, k, v; `spread` widens the scores."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, group * kv_heads, rows, head_dim), *[(batch, kv_heads, columns, head_dim)] * 2]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shared_view(
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_len: int,
    query_len: list[int],
    *,
    seed: int = 0,
    layers: int = 1,
    layer: int = 0,
    spare_tiles: int = 0,
) -> KVView:
    """All readers share row 0's first `prefix_len` keys; their own keys follow.

    Args:
        k: `[B, kv_heads, T, head_dim]` bf16; rows agree in the first `prefix_len` tokens.
        v: the same shape.
        prefix_len: tokens of the prefix.
        query_len: query rows of each reader.
        seed: places the blocks in the pool.
        layers: layers in a block; the others hold NaN.
        layer: where this K and V go.
        spare_tiles: unused suffix tiles, filled with NaN.
    """
    return paged_view([(k[0, :, :prefix_len], v[0, :, :prefix_len])], [0] * len(k),
                      [(k[b, :, prefix_len:], v[b, :, prefix_len:]) for b in range(len(k))], query_len,
                      seed=seed, layers=layers, layer=layer, spare_tiles=spare_tiles)  # fmt: skip


def paged_view(
    prefixes: list[tuple[torch.Tensor, torch.Tensor]],
    reader_prefix: list[int],
    suffixes: list[tuple[torch.Tensor, torch.Tensor]],
    query_len: list[int],
    *,
    seed: int = 0,
    layers: int = 1,
    layer: int = 0,
    spare_tiles: int = 0,
) -> KVView:
    """Readers with own prefixes and suffixes, each `(k, v)` of `[kv_heads, tokens, head_dim]`."""
    heads, _, head_dim = suffixes[0][0].shape
    num_blocks = [-(-k.shape[1] // BLOCK_TOKENS) for k, _ in prefixes]
    block_size = 2 * BLOCK_TILES * layers * heads * head_dim * TILE_TOKENS
    pool = torch.full(((sum(num_blocks) + 1) * block_size,), float("nan"), dtype=torch.bfloat16)
    places = random.Random(seed).sample(range(sum(num_blocks) + 1), sum(num_blocks))
    table = torch.zeros(len(prefixes), max(num_blocks), 2, dtype=torch.int64)
    for p, (k, v) in enumerate(prefixes):
        for i in range(num_blocks[p]):
            base = places.pop() * block_size
            table[p, i] = torch.tensor([base, base + block_size // 2])
            tokens = slice(i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS)
            for tiles, offset in zip(pack(k[None, :, tokens], v[None, :, tokens]), table[p, i].tolist(), strict=True):
                shape = (tiles.shape[0], layers, heads, *tiles.shape[-2:])
                part = pool[offset : offset + tiles[0].numel() * layers * tiles.shape[0]].view(shape)
                part[:, layer] = tiles[:, 0]
    tails = [prefixes[p][0].shape[1] % TILE_TOKENS for p in reader_prefix]
    lens = [k.shape[1] for k, _ in suffixes]
    tiles = max(1, *(-(-(t + n) // TILE_TOKENS) for t, n in zip(tails, lens, strict=True)), 1) + spare_tiles
    suffix_k = torch.full((len(suffixes), heads, tiles, head_dim, TILE_TOKENS), float("nan"), dtype=torch.bfloat16)
    suffix_v = torch.full((len(suffixes), heads, tiles, TILE_TOKENS, head_dim), float("nan"), dtype=torch.bfloat16)
    for b, (k, v) in enumerate(suffixes):
        prefix_k, prefix_v = prefixes[reader_prefix[b]]
        start = prefix_k.shape[1] - tails[b]
        own_k = torch.cat([prefix_k[:, start:], k], dim=1)
        own_v = torch.cat([prefix_v[:, start:], v], dim=1)
        pad = (0, 0, 0, -own_k.shape[1] % TILE_TOKENS)
        used = -(-own_k.shape[1] // TILE_TOKENS)
        # Beyond a reader's tokens K may hold anything; only its own tokens are ever added up.
        suffix_k[b, :, :used] = F.pad(own_k, pad, value=float("nan")).unflatten(1, (used, TILE_TOKENS)).mT
        suffix_v[b, :, :used] = F.pad(own_v, pad, value=float("nan")).unflatten(1, (used, TILE_TOKENS))
    return KVView(
        pool=pool, block_table=table, prefix_len=int32(*(k.shape[1] for k, _ in prefixes)),
        reader_prefix=int32(*reader_prefix), suffix_k=suffix_k, suffix_v=suffix_v, suffix_len=int32(*lens),
        query_len=int32(*query_len), num_layers=layers, layer=layer, block_tiles=BLOCK_TILES,
    )  # fmt: skip
