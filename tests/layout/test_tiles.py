"""Tiles: no bit is lost or moved to the wrong token, whatever the length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.errors import LayoutError
from kvkern.layout import TILE_TOKENS, pack, unpack
from kvkern.layout.tiles import blocks_for, tiles_for


def all_patterns(layers: int, heads: int, n: int, dim: int, start: int) -> torch.Tensor:
    """Fill a bf16 tensor with consecutive bit patterns, NaNs and -0 among them."""
    count = torch.arange(layers * heads * n * dim) + start
    return count.to(torch.int16).view(torch.bfloat16).view(layers, heads, n, dim)


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    n=st.integers(1, 200),
    dim=st.sampled_from([2, 64, 128]),
    start=st.integers(0, 65535),
)
def test_tiles__every_bit_comes_back(layers: int, heads: int, n: int, dim: int, start: int) -> None:
    k, v = (all_patterns(layers, heads, n, dim, s) for s in (start, start + 7))
    k_tiles, v_tiles = pack(k, v)
    assert k_tiles.shape == (tiles_for(n), layers, heads, dim, TILE_TOKENS)
    assert v_tiles.shape == (tiles_for(n), layers, heads, TILE_TOKENS, dim)
    for given_back, original in zip(unpack(k_tiles, v_tiles, n), (k, v), strict=True):
        assert torch.equal(given_back.view(torch.int16), original.view(torch.int16))


@pytest.mark.parametrize("n", [1, 15, 63, 64, 65, 255, 256, 257])
def test_tiles__token_lies_where_the_format_says(n: int) -> None:
    k, v = (all_patterns(2, 3, n, 4, s) for s in (0, 9000))
    k_tiles, v_tiles = (t.view(torch.int16) for t in pack(k, v))
    for token in {0, n // 2, n - 1}:
        tile, column = divmod(token, 64)
        assert torch.equal(k_tiles[tile, ..., column], k.view(torch.int16)[:, :, token])
        assert torch.equal(v_tiles[tile, :, :, column], v.view(torch.int16)[:, :, token])
    if n % 64:
        assert not k_tiles[-1, ..., n % 64 :].any() and not v_tiles[-1, :, :, n % 64 :].any()


def test_tiles__strided_input_needs_no_copy_by_the_caller() -> None:
    k = all_patterns(2, 70, 3, 8, 0).transpose(1, 2)
    v = k.flip(-1)
    back = unpack(*pack(k, v), 70)
    assert torch.equal(back[0].view(torch.int16), k.contiguous().view(torch.int16))
    assert torch.equal(back[1].view(torch.int16), v.contiguous().view(torch.int16))


@pytest.mark.parametrize(
    ("k", "v", "names"),
    [
        (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8).bfloat16(), "k must be a torch.bfloat16"),
        (torch.zeros(1, 4, 8).bfloat16(), torch.zeros(1, 4, 8).bfloat16(), "k must have 4"),
        (torch.zeros(1, 1, 0, 8).bfloat16(), torch.zeros(1, 1, 0, 8).bfloat16(), "k must have 4"),
        (torch.zeros(1, 1, 4, 8).bfloat16(), torch.zeros(1, 1, 5, 8).bfloat16(), "one shape"),
        (None, None, "k must be a torch.bfloat16"),
    ],
)
def test_raises_pack__form(k: torch.Tensor, v: torch.Tensor, names: str) -> None:
    with pytest.raises(LayoutError, match=names):
        pack(k, v)


@pytest.mark.parametrize("n", [0, 64, 129])
def test_raises_unpack__wrong_count(n: int) -> None:
    k_tiles, v_tiles = pack(*(torch.zeros(1, 1, 65, 8).bfloat16() for _ in range(2)))
    with pytest.raises(LayoutError, match="2 tiles hold 65 to 128"):
        unpack(k_tiles, v_tiles, n)


def test_tiles__counts_at_the_edges() -> None:
    assert [tiles_for(n) for n in (1, 64, 65)] == [1, 1, 2]
    assert [blocks_for(n) for n in (1, 256, 257)] == [1, 1, 2]
