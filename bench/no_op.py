"""A model step without attention: what is left is the floor that no attention, however fast, gets under."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from torch import Tensor

NO_OP = "bench_no_op"


def register() -> None:
    """Register an attention that hands the queries on, and a mask that is none."""
    AttentionInterface.register(NO_OP, _hand_queries_on)
    AttentionMaskInterface.register(NO_OP, lambda *_, **__: None)


def empty_cache(layers: int, columns: int) -> Cache:
    """Return a cache that says it holds `columns` columns and stores nothing."""
    return Cache(layers=[_NothingLayer(columns) for _ in range(layers)])


def _hand_queries_on(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


class _NothingLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1
