"""Random layers for attention alone: one prefix in mapped shards, and the same keys dense for the stock peers."""

from __future__ import annotations

import tempfile
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from bench.bits import compared
from kvkern.attention import launch, resolve
from kvkern.contract import TILE_TOKENS
from kvkern.kernels import native
from kvkern.layout import BlockStore, map_pool
from kvkern.spec import KVSpec
from kvkern.view import KVView
from tests.support.views import int32

if TYPE_CHECKING:
    from torch import Tensor

    from bench.shapes import LayerShape
    from kvkern.layout import MappedPool

_CHUNK = 8


class Layers:
    """A published random prefix of several layers, with `batch` readers that add one token each.

    Args:
        shape: the layer.
        batch: the most readers; a call may take fewer.
    """

    def __init__(self, shape: LayerShape, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).bfloat16()

        heads, head_dim = shape.num_kv_heads, shape.head_dim
        self.shape = shape
        self.count = shape.layers
        self.k, self.v = (normal(self.count, heads, shape.prefix_len, head_dim) for _ in range(2))
        self.q = normal(self.count, batch, shape.num_q_heads, 1, head_dim)
        self.new_k, self.new_v = (normal(self.count, batch, heads, 1, head_dim) for _ in range(2))
        self.pool = self._publish()

    def _publish(self) -> MappedPool:
        """Publish to a store that is deleted at once; the mappings keep its blocks."""
        shape = self.shape
        sizes = (self.count, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        spec = KVSpec("0" * 64, "Random", *sizes, config={})
        with tempfile.TemporaryDirectory() as root:
            store = BlockStore(root)
            done = store.put(spec, list(range(shape.prefix_len)), self.k, self.v)
            return map_pool(store.get(done.digest).shards)

    def view(self, layer: int, batch: int) -> KVView:
        """Return what the first `batch` readers see in a layer: the prefix in place, and one token of their own."""
        shape, tail = self.shape, self.shape.prefix_len % TILE_TOKENS
        tiles = (batch, shape.num_kv_heads, -(-(tail + 1) // TILE_TOKENS))
        suffix_k = torch.zeros(*tiles, shape.head_dim, TILE_TOKENS, dtype=torch.bfloat16)
        suffix_v = torch.zeros(*tiles, TILE_TOKENS, shape.head_dim, dtype=torch.bfloat16)
        own = [x[:, :, shape.prefix_len - tail :] for x in self.dense(layer, slice(batch))[1:]]
        native.append(*own, suffix_k, suffix_v, int32(*[0] * batch), int32(*[tail + 1] * batch))
        return KVView(
            pool=self.pool.anchor,
            block_table=self.pool.block_table[None].contiguous(),
            prefix_len=int32(shape.prefix_len),
            reader_prefix=int32(*[0] * batch),
            suffix_k=suffix_k,
            suffix_v=suffix_v,
            suffix_len=int32(*[1] * batch),
            query_len=int32(*[1] * batch),
            num_layers=self.count,
            layer=layer,
        )

    def dense(self, layer: int, readers: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[B, Hq, 1, D]`, K and V `[B, Hkv, P + 1, D]` of some readers, the prefix repeated for each."""
        q = self.q[layer, readers]
        prefix = (x[layer].expand(q.shape[0], -1, -1, -1) for x in (self.k, self.v))
        new = (x[layer, readers] for x in (self.new_k, self.new_v))
        k, v = (torch.cat(parts, dim=2) for parts in zip(prefix, new, strict=True))
        return q, k, v

    def exact(self, batch: int, layers: int | None = None) -> ExactPeer:
        """Return kvkern's peer for the first `batch` readers."""
        return ExactPeer(self, batch, layers or self.count)

    def stock(self, batch: int, layers: int | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return dense inputs of the first `batch` readers, layer by layer."""
        return [self.dense(layer, slice(batch)) for layer in range(layers or self.count)]

    def oracle(self, layer: int, batch: int) -> Tensor:
        """Return stock eager's output `[B, 1, Hq, D]`, a few readers at a time: its K and V are repeated for each."""
        chunks = (slice(start, min(start + _CHUNK, batch)) for start in range(0, batch, _CHUNK))
        return torch.cat([eager(*self.dense(layer, chunk)) for chunk in chunks])


class ExactPeer:
    """kvkern's exact attention, called as the model patch calls it: unvalidated, with an output allocated per call."""

    def __init__(self, layers: Layers, batch: int, count: int) -> None:
        self.views = [layers.view(layer, batch) for layer in range(count)]
        self.q = [layers.q[layer, :batch] for layer in range(count)]
        self.bytes_moved = resolve(self.q[0], self.views[0]).bytes_moved
        self.oracle = partial(layers.oracle, batch=batch)

    def __call__(self, slot: int) -> Tensor:
        """Attend in one layer."""
        q, view = self.q[slot % len(self.q)], self.views[slot % len(self.q)]
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        launch(q, view, out, None)
        return out

    def verified(self) -> dict[str, object]:
        """Compare every layer with stock eager, and assert that no bit differs."""
        return compared(((self(layer), self.oracle(layer)) for layer in range(len(self.q))), claim=True)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hugging Face's eager attention of one decode step, with the zero mask that it is given then."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = q.new_zeros(q.shape[0], 1, 1, k.shape[2])
    return eager_attention_forward(module, q, k, v, mask, q.shape[-1] ** -0.5)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run torch's scaled_dot_product_attention as Hugging Face calls it for one decode step."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def dense_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes of q, K, V and out, each moved once, before anything is repeated."""
    return 2 * q.nbytes + k.nbytes + v.nbytes
