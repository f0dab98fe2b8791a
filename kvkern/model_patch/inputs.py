"""Build what `generate()` and `model()` need on an attached prefix: ids, full-length mask, positions, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvkern.errors import LayoutError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern.model_patch.cache import PrefixCache
    from kvkern.model_patch.store import Prefix

    TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


def prepare(
    prefix: Prefix,
    input_ids: TokenIds,
    *,
    attention_mask: Tensor | None = None,
    cache: PrefixCache | None = None,
    after: Tensor | None = None,
    whole_prompt: bool = False,
) -> dict[str, Any]:
    """See `Prefix.prepare`."""
    from kvkern.model_patch.cache import PrefixCache

    pad_id = _pad_id(prefix)
    ids, mask = pad_left(input_ids, attention_mask, pad_id=pad_id)
    if cache is None:
        if after is not None:
            raise LayoutError("after= continues a live cache: pass that cache too")
        cache = PrefixCache(prefix, batch=ids.shape[0])
    else:
        _require_live(prefix, cache, batch=ids.shape[0])
        if after is not None:
            ids, mask = _with_uncached_tail(ids, mask, cache, after)
    if ids.shape[1] == 0 or not bool(mask.any(1).all()):
        raise UnsupportedError(
            "the prefix covers the whole prompt: a reader needs at least one token of its own to go on from. Attach a "
            "shorter prefix or ask a question."
        )
    if whole_prompt:
        read = _tokens_read(cache, after, batch=ids.shape[0])
        rows = [torch.cat([before, row[keep]]) for before, row, keep in zip(read, ids, mask, strict=True)]
        ids, _ = pad_left(rows, None, pad_id=pad_id)
    full_mask = cache.announce(mask, whole_prompt=whole_prompt)
    inputs = {"input_ids": ids, "attention_mask": full_mask.long()}
    if not bool(full_mask.all()):
        _require_positions_from_zero(prefix.model)
    if not whole_prompt and not bool(full_mask.all()):  # otherwise transformers finds the positions itself
        inputs["position_ids"] = (cache.lens[:, None] + (mask.cumsum(1) - 1).clamp_min(0)).long()
    device = prefix.model.device
    return {**{name: tensor.to(device) for name, tensor in inputs.items()}, "past_key_values": cache}


def _require_positions_from_zero(model: PreTrainedModel) -> None:
    """Refuse padded rows for models that count positions from their padding id, as RoBERTa does.

    Raises:
        UnsupportedError: naming the module.
    """
    for name, module in model.named_modules():
        if hasattr(type(module), "create_position_ids_from_input_ids"):
            raise UnsupportedError(
                f"{type(model).__name__}.{name} counts positions from its padding id: give rows of one length to "
                "prepare(), or one row at a time"
            )


def pad_left(input_ids: TokenIds, attention_mask: Tensor | None, *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Bring rows of token ids to one width, padding on the left.

    Args:
        input_ids: `[T]` or `[B, T]` tensor, a list of ids, or a list of rows of different length.
        attention_mask: `[B, T]`, 0 where a tokenizer has padded, on either side.
        pad_id: id that stands in for padding.

    Returns:
        ids `[B, T]` int64, and mask `[B, T]` bool.

    Raises:
        LayoutError: the ids are no integers, or the mask has another shape.
    """
    if isinstance(input_ids, torch.Tensor):
        input_ids = input_ids.cpu()
        table = input_ids[None] if input_ids.dim() == 1 else input_ids
        if table.dim() != 2 or table.is_floating_point():
            raise LayoutError(
                f"input_ids must be integers [T] or [B, T], got {tuple(input_ids.shape)} {input_ids.dtype}"
            )
        if attention_mask is None:
            return table.long(), torch.ones_like(table, dtype=torch.bool)
        if attention_mask.shape != table.shape:
            raise LayoutError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(table.shape)}")
        rows = [row[keep.bool()] for row, keep in zip(table, attention_mask.cpu(), strict=True)]
    else:
        if attention_mask is not None:
            raise LayoutError("attention_mask goes with a tensor of input_ids; rows of a list have their own length")
        is_nested = len(input_ids) > 0 and torch.as_tensor(input_ids[0]).dim() > 0
        rows = [_id_row(row) for row in (input_ids if is_nested else [input_ids])]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = True
    return ids, mask


def _id_row(row: Sequence[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(row).cpu().reshape(-1)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise LayoutError(f"input_ids must be integers, got a row of {ids.dtype}")
    return ids.long()


def _pad_id(prefix: Prefix) -> int:
    config = prefix.model.generation_config or prefix.model.config
    for given in (config.pad_token_id, config.eos_token_id):
        if given is not None:
            return given[0] if isinstance(given, list) else int(given)
    return 0


def _require_live(prefix: Prefix, cache: PrefixCache, *, batch: int) -> None:
    from kvkern.model_patch.cache import PrefixCache

    if not isinstance(cache, PrefixCache):
        raise LayoutError(f"cache must be the PrefixCache of an earlier prepare(), got {type(cache).__name__}")
    if cache.prefix is not prefix:
        raise LayoutError("cache is attached to another prefix: leave cache out to start afresh on this one")
    if cache.is_pending:
        raise LayoutError("cache was prepared and not run yet: run the model on those inputs first, or leave cache out")
    if cache.lens.shape[0] != batch:
        raise LayoutError(f"cache has {cache.lens.shape[0]} readers, input_ids {batch} rows: give one row to each")


def _with_uncached_tail(ids: Tensor, mask: Tensor, cache: PrefixCache, after: Tensor) -> tuple[Tensor, Tensor]:
    """Put the tokens of generate()'s output that the cache has not seen in front of the next ids."""
    if after.dim() != 2 or after.shape[0] != ids.shape[0]:
        raise LayoutError(f"after must be generate()'s output [{ids.shape[0]}, T], got {tuple(after.shape)}")
    seen = cache.columns - cache.prompt_start
    if not 0 <= after.shape[1] - seen <= 1:
        raise LayoutError(
            f"after has {after.shape[1]} tokens, the cache has seen {seen} from the first of its last inputs on: pass "
            "the output of the last generate() on this cache"
        )
    tail = after[:, seen:].cpu()
    if bool((~mask).any()) and tail.shape[1]:
        rows = [torch.cat([last, row[keep]]) for last, row, keep in zip(tail, ids, mask, strict=True)]
        return pad_left(rows, None, pad_id=int(ids[~mask][0]))
    return torch.cat([tail, ids], dim=1), torch.cat([torch.ones_like(tail, dtype=torch.bool), mask], dim=1)


def _tokens_read(cache: PrefixCache, after: Tensor | None, *, batch: int) -> Tensor:
    """Return the ids of all that the cache has read, `[B, columns]`: the prefix, or all but the end of `after`."""
    if after is not None and cache.prompt_start == 0:
        return after[:, : cache.columns].cpu()
    if after is None and cache.columns == cache.prefix.tokens:
        return cache.prefix.token_ids.expand(batch, -1)
    raise LayoutError(
        "a whole prompt on a live cache begins with the ids of all that the cache has read: pass after=, the output of "
        "generate() on inputs that were prepared with whole_prompt=True, too"
    )
