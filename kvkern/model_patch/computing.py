"""Prefill: a document's KV as a model computes it, by one forward over its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvkern.errors import UnsupportedError
from kvkern.model_patch.attending import attending_by
from kvkern.model_patch.eager_form import require_form
from kvkern.model_patch.forwards import package_of, wrapped_chain
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
        require_known_attention(model.config._attn_implementation)
        return model, None
    _require_eager_form(model)
    register()
    require_known_attention(IMPLEMENTATION)
    own = model.config._attn_implementation
    if own != "eager":
        return attending_by(model, IMPLEMENTATION), IMPLEMENTATION
    require_known_attention(own)
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


def require_known_attention(name: str) -> None:
    """Refuse an attention implementation whose function, or mask, somebody else has registered."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for what, registry in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        function = dict(registry).get(name)
        function = getattr(function, "func", function)
        foreign = [f for f in wrapped_chain(function) if package_of(f) not in ("transformers", "kvkern")]
        if foreign:
            raise UnsupportedError(
                f"{what} implementation {name!r} is a function of {foreign[0].__globals__.get('__name__')}: what it "
                "computes is not known. Take attention='exact', or an implementation of transformers"
            )
