"""The mask that kvkern asks of transformers: which columns are padding, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvkern.errors import UnsupportedError
from kvkern.model_patch.agreement import require_mask_width

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Return the 2D padding mask, or None when nothing is padded. Signature of transformers' mask interface.

    Args:
        batch_size: rows.
        q_length: query columns of this forward.
        kv_length: key columns, those of this forward among them.
        q_offset: position of the first query.
        kv_offset: position of the first key; kvkern's caches keep all, so it is 0.
        mask_function: must be transformers' plain causal function.
        attention_mask: `[batch, kv_length]` bool, False where a column is padding.

    Returns:
        `[batch, kv_length]` bool, or None.

    Raises:
        UnsupportedError: another mask function, or a mask whose width is not that of the keys.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not None and mask_function is not causal_mask_function:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise UnsupportedError(
            f"mask function {name} is not plain causal attention (sliding, packed or overlaid masks are not computed "
            "by kvkern): call kvkern.unpatch(model) for it"
        )
    if kv_offset != 0:
        raise UnsupportedError(
            f"the cache drops keys (kv_offset {kv_offset}): kvkern attends to all keys of a sequence"
        )
    if int(q_offset) + q_length != kv_length:
        raise UnsupportedError(
            f"the cache shows {kv_length} columns for {int(q_offset)} tokens and {q_length} queries, as a static one: "
            "use a PrefixCache, a DynamicCache or none, or call kvkern.unpatch(model)"
        )
    if attention_mask is None:
        return None
    require_mask_width(attention_mask, q_length, kv_length)
    return None if bool(attention_mask.all()) else attention_mask
