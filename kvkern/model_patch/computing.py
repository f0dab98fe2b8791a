"""Prefill: a document's KV as a model computes it, by one forward over its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvkern.errors import UnsupportedError
from kvkern.model_patch.attending import attending_by
from kvkern.model_patch.eager_form import require_form
from kvkern.model_patch.register import IMPLEMENTATION, register
from kvkern.model_patch.whole import is_entered
from kvkern.probe import stock_order

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ATTENTIONS = ("exact", "model")
PARITY_TOKENS = 64
"""Above so many tokens stock eager adds in the contract's order in every call (CONTRACT.md, stock parity)."""


def publisher_of(model: PreTrainedModel, attention: str, tokens: int) -> tuple[PreTrainedModel, str | None]:
    """Choose what computes a document of producer `stock`.

    Args:
        model: as the user has it.
        attention: `exact`: the bits of stock eager, by kvkern's attention where that is known to have them. `model`:
            the model as it is.
        tokens: of the document.

    Returns:
        The model that runs, sharing all weights, and the name of what attends, for the spec; None: as the model says.

    Raises:
        UnsupportedError: `attention` is another word; under `exact`, the model's own eager attention is not stock
            eager; under `model`, it attends by a function that neither transformers nor kvkern defines.
    """
    if attention not in ATTENTIONS:
        raise UnsupportedError(f"attention is {attention!r}: take {' or '.join(map(repr, ATTENTIONS))}")
    if attention == "model" or is_entered(model):
        _require_known_attention(model)
        return model, None
    _require_eager_form(model)
    register()
    own = model.config._attn_implementation
    if own != "eager":
        return attending_by(model, IMPLEMENTATION), IMPLEMENTATION
    is_equal = model.device.type == "cpu" and tokens > PARITY_TOKENS and stock_order().follows
    return attending_by(model, IMPLEMENTATION if is_equal else own), own


def _require_eager_form(model: PreTrainedModel) -> None:
    try:
        require_form(model)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}. Or publish what the model computes as it is: attention='model'") from None


def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model once over `ids [B, n]` and return K and V `[layers, kv_heads, n, head_dim]` bf16 of the first row.

    Autocast is off meanwhile: it would cast what the model's own dtypes leave alone.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        model(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return tuple(
            torch.cat([getattr(layer, name)[:1] for layer in cache.layers]).cpu() for name in ("keys", "values")
        )


def _require_known_attention(model: PreTrainedModel) -> None:
    from transformers import AttentionInterface

    name = model.config._attn_implementation
    function = AttentionInterface().get(name)
    if name in (None, "eager"):
        return
    home = getattr(getattr(function, "func", function), "__module__", None)
    if (home or "").partition(".")[0] not in ("transformers", "kvkern"):
        raise UnsupportedError(
            f"attention implementation {name!r} is a function of {home}: what it computes is not known. Take "
            "attention='exact', or an implementation of transformers"
        )
