"""The plan and the cost model of the fast profile: bytes against the floor, room for every batch, the unit's choice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gate import fast_model
from kvkern.kernels.fast_cost import cost, seconds
from kvkern.kernels.fast_plan import FastShape, plan_with
from kvkern.kernels.launch_config import fast_config

SM90 = fast_config("sm90")
SHAPE = FastShape(8, 1, 8, 4, 1, 128, 64, 2)


@pytest.mark.parametrize("keys", [3774, 32768])
@pytest.mark.parametrize("readers", [1, 8, 64, 256])
def test_cost__bytes_against_the_floor(readers: int, keys: int) -> None:
    spent = cost(fast_model.plan_of(readers, keys), SM90, keys, fast_model.SUFFIX)
    kv_bytes = (keys + readers * 64) * 2 * 8 * 128 * 2
    assert spent.floor_bytes == kv_bytes + 2 * readers * 32 * 128 * 2, "suffixes are in the floor"
    assert spent.launches == 1
    assert spent.hbm_bytes > spent.floor_bytes, "states and padded tiles are counted"
    if readers <= 8 or (readers, keys) == (64, 32768):
        assert spent.hbm_bytes <= 1.25 * spent.floor_bytes
    assert spent.state_bytes_under_way <= SM90.l2_bytes


def test_cost__states_beyond_the_cache_are_read_from_memory() -> None:
    """Both sides of the only threshold: the size of the cache."""
    made = plan_with(SHAPE, 64, 1024)
    spent = cost(made, SM90, 4096, 64)
    states, under_way = spent.state_bytes, spent.state_bytes_under_way
    sizes = {}
    for size in (under_way, under_way - 1):
        config = fast_config("sm90").__class__(**{**vars(SM90), "l2_bytes": size})
        sizes[size] = cost(made, config, 4096, 64).hbm_bytes
    assert sizes[under_way - 1] - sizes[under_way] == states


def test_cost__counts_by_hand() -> None:
    """One reader of 130 keys and 10 of its own: 2 tiles of the prefix, 1 of its own, a unit each."""
    spent = cost(plan_with(FastShape(1, 1, 2, 4, 1, 64, 4, 1), 64, 256), SM90, 130, 10)
    tile_bytes = 64 * 2 * 2 * 64 * 2
    assert spent.kv_bytes == 3 * tile_bytes
    assert (spent.live, spent.cached_bytes) == (2 * 2, 0)
    assert spent.state_bytes == 4 * (2 * 4 * 2) * 66
    assert spent.flops == 3 * 2 * 4 * 64 * 64 * 64


@pytest.mark.parametrize(("readers", "keys", "unit"), [(1, 3774, 256), (1, 32768, 1024), (8, 3774, 1024)])
def test_plan__takes_the_unit_that_the_model_finds_cheapest(readers: int, keys: int, unit: int) -> None:
    made = fast_model.plan_of(readers, keys)
    assert made.unit_tokens == unit
    others = [plan_with(made.shape, 64, other) for other in SM90.units(128)]
    assert seconds(made, SM90) == min(seconds(other, SM90) for other in others)


def test_recommend__bits_or_speed() -> None:
    for readers in (1, 8):
        for keys in (64, 3774, 32768):
            times = fast_model.predicted_us(readers, keys)
            assert fast_model.recommend(readers, keys, stock_bits=True) == "exact"
            assert fast_model.recommend(readers, keys, stock_bits=False) == min(times, key=times.__getitem__)


def test_recommend__page_is_what_the_model_says() -> None:
    assert fast_model.PAGE.read_text() == fast_model.page(), "run python -m bench.gate.fast_model"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=70), st.integers(1, 40))
def test_plan__row_blocks_of_all_prefixes_have_numbers_of_their_own(reader_prefix: list[int], rows: int) -> None:
    made = plan_with(FastShape(len(reader_prefix), 6, 1, 1, rows, 64, 4, 1), 64, 256)
    taken = []
    for prefix in range(6):
        first = sum(p < prefix for p in reader_prefix) // made.per_block + prefix
        taken += [first + i for i in range(-(-reader_prefix.count(prefix) // made.per_block))]
    assert len(set(taken)) == len(taken) and max(taken) < made.row_blocks // made.parts
    assert made.counters == made.row_blocks and 1 << made.search_steps >= 6


@given(st.integers(0, 2000), st.integers(1, 70))
def test_plan__suffix_units_hold_any_alignment(prefix_tiles: int, tiles: int) -> None:
    for unit in (256, 1024, 4096):
        made = plan_with(FastShape(1, 1, 1, 1, 1, 64, 2000, tiles), 64, unit)
        size = unit // 64
        assert (prefix_tiles + tiles - 1) // size - prefix_tiles // size + 1 <= made.suffix_units
