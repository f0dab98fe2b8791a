"""Pool: a kernel that follows the table reads exactly the published bits."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvkern.errors import LayoutError
from kvkern.layout import BlockStore, map_pool, pack, stack_tables


def read(anchor: Tensor, offset: int, count: int) -> Tensor:
    """Read elements as a kernel does: from an address and an offset."""
    address = anchor.data_ptr() + 2 * offset
    buffer = (ctypes.c_int16 * count).from_address(address)
    return torch.tensor(list(buffer), dtype=torch.int16)


def test_pool__table_leads_to_the_published_bits(store: BlockStore, make: Callable[..., object]) -> None:
    sample = make(600)
    pool = store.get(sample.put(store).digest).pool()
    gc.collect()  # only the pool keeps the mappings alive now
    k_tiles, v_tiles = (t.view(torch.int16) for t in pack(sample.k, sample.v))
    assert pool.block_table.shape == (3, 2) and pool.block_table.dtype == torch.int64
    assert pool.block_table[0, 0] == 0
    for i, (k_offset, v_offset) in enumerate(pool.block_table.tolist()):
        for tiles, offset in ((k_tiles, k_offset), (v_tiles, v_offset)):
            want = tiles[4 * i : 4 * i + 4].reshape(-1)
            assert torch.equal(read(pool.anchor, offset, want.numel()), want)


def test_pool__two_prefixes_share_one_anchor(store: BlockStore, make: Callable[..., object]) -> None:
    samples = [make(300, seed=1), make(520, seed=2)]
    pools = [store.get(s.put(store).digest).pool() for s in samples]
    anchor = pools[0].anchor
    tables = stack_tables([pool.table_from(anchor) for pool in pools])
    assert tables.shape == (2, 3, 2) and not tables[0, 2].any()
    k_tiles = pack(samples[1].k, samples[1].v)[0].view(torch.int16)
    assert torch.equal(read(anchor, int(tables[1, 0, 0]), 999), k_tiles.reshape(-1)[:999])


def test_pool__tensors_outlive_document_and_store(
    store: BlockStore, make: Callable[..., object], same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    sample = make(64)
    k = store.get(sample.put(store).digest).shards[0].k
    gc.collect()
    assert same_bits(k, pack(sample.k, sample.v)[0])


def test_raises_pool__nothing_to_map() -> None:
    with pytest.raises(LayoutError, match="shards"):
        map_pool([])
    with pytest.raises(LayoutError, match="tables"):
        stack_tables([])
    with pytest.raises(LayoutError, match=r"tables\[1\]"):
        stack_tables([torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)])


@pytest.mark.parametrize(("first", "count"), [(0, None), (0, 1), (63, 2), (64, 64), (255, 2), (300, 299), (599, 1)])
def test_document__kv_of_some_tokens(store: BlockStore, make: Callable[..., object], first: int, count: int) -> None:
    sample = make(600)
    last = 600 if count is None else first + count
    for part, whole in zip(store.get(sample.put(store).digest).kv(first, count), (sample.k, sample.v), strict=True):
        assert torch.equal(part.view(torch.int16), whole[:, :, first:last].view(torch.int16))
