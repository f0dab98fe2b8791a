"""What a reader sees: keys and values in tiles (`KVView`), how tokens get there, and what no kernel could read."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvkern.contract import TILE_TOKENS
from kvkern.errors import LayoutError
from kvkern.kernels import native

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVView:
    """The keys and values of B readers in one layer: tiles of P shared prefixes, and each reader's own suffix tiles.

    Everything goes by absolute position. Reader b owns `prefix_len[reader_prefix[b]]` prefix keys, then `suffix_len[b]`
    suffix keys. Its tiles before `prefix_len // 64` come from the pool; the first suffix tile starts at position
    `64 * (prefix_len // 64)` with a copy of the prefix's last `prefix_len % 64` tokens.

    Attributes:
        pool: bf16 anchor on the device; offsets count elements from its data pointer.
        block_table: `[P, max_blocks, 2]` int64, offset of each block's K and V; a block holds
            `k [tiles, layers, kv_heads, head_dim, 64]` and `v [tiles, layers, kv_heads, 64, head_dim]`.
        prefix_len: `[P]` int32, tokens.
        reader_prefix: `[B]` int32, the row of `block_table` that a reader uses.
        suffix_k: `[B, kv_heads, tiles, head_dim, 64]` bf16.
        suffix_v: `[B, kv_heads, tiles, 64, head_dim]` bf16, with the strides of `suffix_k`.
        suffix_len: `[B]` int32, tokens after the prefix, the queries of this call among them.
        query_len: `[B]` int32: the last `query_len[b]` rows of q are queries, the rows before are padding.
        num_layers: layers that a block holds.
        layer: the layer that is attended to.
        block_tiles: tiles of a full block.
    """

    pool: Tensor
    block_table: Tensor
    prefix_len: Tensor
    reader_prefix: Tensor
    suffix_k: Tensor
    suffix_v: Tensor
    suffix_len: Tensor
    query_len: Tensor
    num_layers: int = 1
    layer: int = 0
    block_tiles: int = 4

    def __getstate__(self) -> dict[str, object]:
        """Leave out `native_keys`: a copy has other addresses."""
        return {name: value for name, value in vars(self).items() if name != "native_keys"}

    @property
    def stride_tile(self) -> int:
        """Elements between neighbouring tiles of a block."""
        return self.num_layers * math.prod(self.suffix_k.shape[1::2]) * TILE_TOKENS

    @property
    def layer_offset(self) -> int:
        """Elements from a tile's start to the first KV head of this layer."""
        return self.layer * math.prod(self.suffix_k.shape[1::2]) * TILE_TOKENS

    @functools.cached_property
    def native_keys(self) -> bytes:
        """What C must know of this view, put together once: for `launch`, whose caller keeps the tensors in place."""
        return native.attention_keys(
            pool=self.pool, block_table=self.block_table, block_tiles=self.block_tiles,
            stride_tile=self.stride_tile, layer_offset=self.layer_offset,
            prefix_len=self.prefix_len, reader_prefix=self.reader_prefix,
            suffix_len=self.suffix_len, query_len=self.query_len,
            suffix_k=self.suffix_k, suffix_v=self.suffix_v,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, k: Tensor, v: Tensor, *, lens: Tensor | None = None, query_len: Tensor | int = 1) -> KVView:
        """Pack plain K and V as suffixes without a prefix.

        Args:
            k: `[B, kv_heads, T, head_dim]` bf16.
            v: the same shape and dtype.
            lens: `[B]` int32, the last `lens[b]` of the T tokens belong to reader b; all T when None.
            query_len: `[B]` int32 or one number, query rows per reader.

        Returns:
            A view over new tiles; k and v are copied.

        Raises:
            LayoutError: k and v differ in shape, or are not bf16 of rank 4.
            UnsupportedError: no backend runs on their device.
        """
        if k.shape != v.shape or k.dim() != 4 or k.dtype != torch.bfloat16 or v.dtype != torch.bfloat16:
            raise LayoutError(
                f"k and v must be bfloat16 [B, kv_heads, T, head_dim] of one shape, got {tuple(k.shape)} {k.dtype} "
                f"and {tuple(v.shape)} {v.dtype}"
            )
        batch, heads, length, head_dim = k.shape
        device = k.device
        count = _int32(length, batch, device) if lens is None else lens
        tiles = max(1, -(-length // TILE_TOKENS))
        suffix_k = k.new_zeros(batch, heads, tiles, head_dim, TILE_TOKENS)
        suffix_v = v.new_zeros(batch, heads, tiles, TILE_TOKENS, head_dim)
        append(native.dense_rows(k), native.dense_rows(v), suffix_k, suffix_v, torch.zeros_like(count), count)
        return cls(
            pool=suffix_k,
            block_table=torch.zeros(1, 0, 2, dtype=torch.int64, device=device),
            prefix_len=_int32(0, 1, device),
            reader_prefix=_int32(0, batch, device),
            suffix_k=suffix_k,
            suffix_v=suffix_v,
            suffix_len=count,
            query_len=_int32(query_len, batch, device) if isinstance(query_len, int) else query_len,
        )


def is_native(tensor: Tensor) -> bool:
    """Whether C reads a tensor, where nobody asks for another backend."""
    return tensor.device.type == "cpu"


def append(k: Tensor, v: Tensor, suffix_k: Tensor, suffix_v: Tensor, first_slot: Tensor, count: Tensor) -> None:
    """Write new tokens into suffix tiles on the device where these are; arguments as in `native.append`.

    Raises:
        UnsupportedError: no backend runs there.
    """
    if is_native(k):
        native.append(k, v, suffix_k, suffix_v, first_slot, count)
        return
    from kvkern.kernels import ops, triton_door

    triton_door.require_available(k.device)
    ops.append(k, v, suffix_k, suffix_v, first_slot, count)


def require_whole_words(q: Tensor, kv: KVView) -> None:
    """Refuse q that cannot be read as 32-bit words, two neighbouring bf16 each, and tiles off a 16-byte boundary."""
    for name, tensor, nbytes in (
        ("q", q, 4),
        ("suffix_k", kv.suffix_k, 16),
        ("suffix_v", kv.suffix_v, 16),
        ("pool", kv.pool, 16),
    ):
        strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        _need(
            tensor.data_ptr() % nbytes == 0 and all(2 * stride % nbytes == 0 for stride in strides), name,
            f"at address {tensor.data_ptr():#x} with strides {tuple(tensor.stride())}",
            f"on a {nbytes}-byte boundary with strides of whole {nbytes} bytes for backend 'triton'",
        )  # fmt: skip
    _need(
        not bool((kv.block_table % 8 != 0).any()), "block_table", kv.block_table.tolist(),
        "multiples of 8 elements, 16 bytes, for backend 'triton'",
    )  # fmt: skip


def validate(q: Tensor, kv: KVView) -> None:
    """Refuse what the backend would read out of bounds or misread, naming the field."""
    _need(q.dim() == 4 and q.dtype == torch.bfloat16 and q.stride(-1) == 1, "q", f"{tuple(q.shape)} {q.dtype}",
         "bfloat16 [B, num_q_heads, Tq, head_dim] with a dense last axis")  # fmt: skip
    batch, num_q_heads, rows, head_dim = q.shape
    _need(
        16 <= head_dim <= 512 and head_dim % 16 == 0,
        "head_dim",
        head_dim,
        "a multiple of 16 from 16 to 512",
    )
    for name, last_two in (
        ("suffix_k", (head_dim, TILE_TOKENS)),
        ("suffix_v", (TILE_TOKENS, head_dim)),
    ):
        tiles: Tensor = getattr(kv, name)
        _need(
            tiles.dim() == 5 and tiles.dtype == torch.bfloat16 and tuple(tiles.shape[-2:]) == last_two
            and tiles.shape[0] == batch and tiles.stride()[-2:] == (last_two[1], 1),
            name, f"{tuple(tiles.shape)} {tiles.dtype}",
            f"bfloat16 [{batch}, kv_heads, tiles, {last_two[0]}, {last_two[1]}], its last two axes dense",
        )  # fmt: skip
    _need(kv.suffix_k.stride()[:3] == kv.suffix_v.stride()[:3] and kv.suffix_k.shape[:3] == kv.suffix_v.shape[:3],
         "suffix_v", f"{tuple(kv.suffix_v.shape)} with strides {kv.suffix_v.stride()}",
         "laid out like suffix_k")  # fmt: skip
    num_kv_heads = kv.suffix_k.shape[1]
    _need(
        num_q_heads % num_kv_heads == 0,
        "num_q_heads",
        num_q_heads,
        f"a multiple of the {num_kv_heads} KV heads",
    )
    for name in ("reader_prefix", "suffix_len", "query_len"):
        field: Tensor = getattr(kv, name)
        _need(field.dtype == torch.int32 and tuple(field.shape) == (batch,) and field.is_contiguous(), name,
             f"{tuple(field.shape)} {field.dtype}", f"contiguous int32 [{batch}]")  # fmt: skip
    table = kv.block_table
    _need(table.dtype == torch.int64 and table.dim() == 3 and table.shape[2] == 2 and table.is_contiguous(),
         "block_table", f"{tuple(table.shape)} {table.dtype}", "contiguous int64 [P, max_blocks, 2]")  # fmt: skip
    _need(kv.prefix_len.dtype == torch.int32 and tuple(kv.prefix_len.shape) == (table.shape[0],)
         and kv.prefix_len.is_contiguous(), "prefix_len",
         f"{tuple(kv.prefix_len.shape)} {kv.prefix_len.dtype} with strides {kv.prefix_len.stride()}",
         f"contiguous int32 [{table.shape[0]}]")  # fmt: skip
    _need(kv.pool.dtype == torch.bfloat16, "pool", kv.pool.dtype, "bfloat16")
    for name, value in vars(kv).items():
        if isinstance(value, torch.Tensor):
            _need(value.device == q.device, name, f"on {value.device}", f"on {q.device} like q")
    _need(0 <= kv.layer < kv.num_layers, "layer", kv.layer, f"from 0 to {kv.num_layers - 1}")
    if batch:
        _validate_lengths(q, kv)


def _validate_lengths(q: Tensor, kv: KVView) -> None:
    """Refuse lengths and rows that reach beyond the tables and tiles."""
    tables, max_blocks = kv.block_table.shape[:2]
    prefix_len, readers = kv.prefix_len.tolist(), kv.reader_prefix.tolist()
    suffix_len, query_len = kv.suffix_len.tolist(), kv.query_len.tolist()
    listed, room = max_blocks * kv.block_tiles, kv.suffix_k.shape[2] * TILE_TOKENS
    _need(min(readers) >= 0 and max(readers) < tables, "reader_prefix", readers, f"from 0 to {tables - 1}")
    _need(
        min(prefix_len) >= 0 and max(prefix_len) // TILE_TOKENS <= listed,
        "prefix_len", prefix_len, f"0 .. {listed * TILE_TOKENS}, the blocks that block_table lists",
    )  # fmt: skip
    _need(min(suffix_len) >= 0, "suffix_len", suffix_len, "at least 0")
    slots = max(prefix_len[p] % TILE_TOKENS + own for p, own in zip(readers, suffix_len, strict=True))
    _need(
        slots <= room,
        "suffix_k", f"{kv.suffix_k.shape[2]} tiles a reader",
        f"at least {-(-slots // TILE_TOKENS)} tiles for suffix_len and the prefix's last tokens",
    )  # fmt: skip
    rows = q.shape[2]
    _need(min(query_len) >= 0 and max(query_len) <= rows, "query_len", query_len, f"from 0 to the {rows} rows of q")


def _need(condition: bool, field: str, given: object, allowed: str) -> None:
    if not condition:
        raise LayoutError(f"{field} is {given}; it must be {allowed}")


def _int32(value: int, length: int, device: torch.device) -> Tensor:
    return torch.full((length,), value, dtype=torch.int32, device=device)
