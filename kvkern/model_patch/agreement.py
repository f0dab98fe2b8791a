"""Refuse a forward over a PrefixCache whose mask or positions are not those of that cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvkern.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

GIVEN_AGAIN = (
    "the model was given tokens again that the cache has. Inputs of prepare(whole_prompt=True) are for "
    "model.generate(), which leaves those tokens out: not with use_cache=False, and with prefill_chunk_size from "
    "transformers 5.21 on. Assisted decoding takes inputs prepared without whole_prompt, from transformers 5.18 on."
)


def require_mask_width(attention_mask: Tensor, query_columns: int, columns: int) -> None:
    """Refuse a mask that does not cover the cache and the columns of this forward.

    Args:
        attention_mask: `[B, columns]`, 0 where a column is padding.
        query_columns: columns of this forward.
        columns: columns after it, those of the cache among them.

    Raises:
        UnsupportedError: the mask has another width.
    """
    width = attention_mask.shape[-1]
    if width == columns:
        return
    why = "the cache was used since these inputs were made. Take fresh inputs from prepare()."
    if width == query_columns:
        why = f"the mask covers the new tokens alone (take fresh inputs from prepare()), or {GIVEN_AGAIN}"
    raise UnsupportedError(f"attention_mask has {width} columns, the cache and this call have {columns}: {why}")


def require_same_padding(attention_mask: Tensor | None, announced: Tensor) -> None:
    """Refuse a mask that differs from the padding that the cache knows.

    Args:
        attention_mask: `[B, columns]` bool; None where nothing is padded.
        announced: the same of the cache, on the CPU.

    Raises:
        UnsupportedError: they differ.
    """
    if bool(announced.all()) if attention_mask is None else torch.equal(attention_mask.cpu(), announced):
        return
    raise UnsupportedError(
        "attention_mask differs from the padding that prepare() announced: pass the mask that prepare() returned; pads "
        "stand between the prefix and the question only"
    )


def require_positions(position_ids: Tensor | None, expected: Tensor, query_len: Tensor) -> None:
    """Refuse positions that do not go on from the tokens that each reader has.

    Args:
        position_ids: `[B, Tq]` of this forward.
        expected: `[B]` on the CPU, where the last token of each reader stands.
        query_len: `[B]` on the CPU, tokens of this forward that are no padding.

    Raises:
        UnsupportedError: they end somewhere else.
    """
    if position_ids is None or position_ids.dim() != 2:
        return
    last = position_ids[:, -1].cpu()
    if not bool(((last != expected) & (query_len > 0)).any()):
        return
    why = (
        "the cache was used since these inputs were made, or ragged rows lack their position_ids. Take fresh inputs "
        "from prepare()."
    )
    if position_ids.shape[1] > 1 and not bool(position_ids[:, 0].any()):
        why = GIVEN_AGAIN
    raise UnsupportedError(
        f"position_ids end at {last.tolist()}, the readers' last tokens stand at {expected.tolist()}: {why}"
    )
