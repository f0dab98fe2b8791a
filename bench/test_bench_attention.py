"""Attention alone: read bandwidth, one decode step of one layer, the cache append, and many readers of one prefix."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from bench.allocator import return_freed_pages
from bench.bandwidth import bandwidth, forms, read_variant
from bench.bits import compared
from bench.layers import Layers, dense_bytes, eager, sdpa
from bench.rotation import READ, REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import QWEN3_4B, READERS, SMOLLM2, LayerShape
from kvkern import prefix_attention
from kvkern.contract import TILE_TOKENS
from kvkern.kernels import native
from tests.support.views import int32

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor

pytestmark = REPLAYED
SHAPES = (QWEN3_4B, SMOLLM2)
STOCK = {"eager": eager, "sdpa": sdpa}
STOCK_BATCHES = (1, 8)
FRESH = "eager-fresh-pages"
DECODE = (READ, "kvkern", "kvkern-public", *STOCK, FRESH)
APPEND = (READ, "kvkern", "dynamic-cache")
MANY = (READ, *(f"kvkern-B{b}" for b in READERS), *(f"{name}-B{b}" for b in STOCK_BATCHES for name in STOCK))


@pytest.mark.parametrize("variant", forms())
def test_bandwidth(benchmark: BenchmarkFixture, variant: str) -> None:
    replay(benchmark, bandwidth()[variant])


@pytest.mark.parametrize("variant", DECODE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(benchmark: BenchmarkFixture, shape: LayerShape, variant: str) -> None:
    replay(benchmark, decode_attention(shape)[variant])


@pytest.mark.parametrize("variant", APPEND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append(benchmark: BenchmarkFixture, shape: LayerShape, variant: str) -> None:
    replay(benchmark, cache_append(shape)[variant])


@pytest.mark.parametrize("variant", MANY)
def test_readers(benchmark: BenchmarkFixture, variant: str) -> None:
    replay(benchmark, readers(QWEN3_4B)[variant])


@functools.cache
def decode_attention(shape: LayerShape) -> dict[str, Cell]:
    """Time one reader's decode step in one layer."""
    layers = Layers(shape)
    exact = layers.exact(1)
    info = {"shape": shape.spelled(), "bytes_moved": exact.bytes_moved}

    def public(slot: int) -> Tensor:
        return prefix_attention(exact.q[slot % layers.count], exact.views[slot % layers.count])

    outputs = ((public(layer), layers.oracle(layer, 1)) for layer in range(layers.count))
    stock = _stock_variants(layers, {name: (name, 1) for name in STOCK}, layers.count)
    variants = [
        read_variant(),
        Variant("kvkern", exact, info=info | exact.verified()),
        Variant("kvkern-public", public, info=info | compared(outputs, claim=True)),
        *stock,
        replace(stock[0], name=FRESH, setup=return_freed_pages),
    ]
    return rotate(f"decode-attention/{shape}", variants, rounds=40, warmup=3)


@functools.cache
def readers(shape: LayerShape) -> dict[str, Cell]:
    """Time 1 to 32 readers of one prefix, and stock's batches over repeated keys."""
    layers = Layers(shape, batch=max(READERS))
    variants = [read_variant()]
    for batch in READERS:
        exact = layers.exact(batch)
        info = {"shape": shape.spelled(batch), "readers": batch, "bytes_moved": exact.bytes_moved}
        variants.append(Variant(f"kvkern-B{batch}", exact, info=info | exact.verified()))
    for batch in STOCK_BATCHES:
        names = {f"{name}-B{batch}": (name, batch) for name in STOCK}
        variants += _stock_variants(layers, names, layers.count if batch == 1 else 2)
    return rotate(f"readers/{shape}", variants, rounds=12)


@functools.cache
def cache_append(shape: LayerShape) -> dict[str, Cell]:
    """Time what a cache pays per step and layer to take one token: kvkern writes it, DynamicCache copies everything."""
    layers = Layers(shape)
    dense = [(layers.k[i][None], layers.v[i][None]) for i in range(layers.count)]
    new = [(layers.new_k[i], layers.new_v[i]) for i in range(layers.count)]
    views = [layers.view(i, 1) for i in range(layers.count)]
    slot_of, one = int32(shape.prefix_len % TILE_TOKENS), int32(1)

    def concatenate(slot: int) -> tuple[Tensor, Tensor]:
        layer = DynamicLayer()
        (layer.keys, layer.values), layer.is_initialized = dense[slot % layers.count], True
        return layer.update(*new[slot % layers.count])

    def write(slot: int) -> None:
        view = views[slot % layers.count]
        native.append(*new[slot % layers.count], view.suffix_k, view.suffix_v, slot_of, one)

    info = {"shape": shape.spelled()}
    read_and_written = {"bytes_moved": 2 * shape.kv_bytes}
    variants = [
        read_variant(),
        Variant("kvkern", write, info=info | _verified_append(layers, write, concatenate, views)),
        Variant("dynamic-cache", concatenate, info=info | read_and_written),
    ]
    return rotate(f"cache-append/{shape}", variants, rounds=40, warmup=3)


def _verified_append(layers: Layers, write: Callable, concatenate: Callable, views: list) -> dict[str, object]:
    """Compare the token that each way has stored, after wiping it from the tiles."""
    place = layers.shape.prefix_len % TILE_TOKENS
    pairs = []
    for layer, view in enumerate(views):
        view.suffix_k[:, :, 0, :, place], view.suffix_v[:, :, 0, place] = float("nan"), float("nan")
        write(layer)
        ours = torch.stack([view.suffix_k[:, :, 0, :, place], view.suffix_v[:, :, 0, place]])
        pairs.append((ours, torch.stack([x[:, :, -1] for x in concatenate(layer)])))
    return compared(pairs, claim=True)


def _stock_variants(layers: Layers, names: dict[str, tuple[str, int]], count: int) -> list[Variant]:
    """Return stock peers under their names, each as (function, batch), over dense inputs that they share."""
    variants = []
    inputs = {batch: layers.stock(batch, count) for _, batch in names.values()}
    for name, (function, batch) in names.items():
        run, dense = STOCK[function], inputs[batch]
        outputs = ((run(*dense[layer]), layers.oracle(layer, batch)) for layer in range(count))
        info = {"shape": layers.shape.spelled(batch), "readers": batch, "bytes_moved": dense_bytes(*dense[0])}
        info |= compared(outputs, claim=False)
        variants.append(Variant(name, lambda slot, run=run, dense=dense: run(*dense[slot % count]), info=info))
    return variants
