"""Put kvkern's attention and mask into transformers' registries, and select or deselect them on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvkern.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "kvkern"
_PREVIOUS = "_kvkern_previous_implementation"


def register() -> None:
    """Register attention and mask under "kvkern" in transformers; safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from kvkern.model_patch.attention import attention_forward
    from kvkern.model_patch.masks import padding_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


def patch(model: PreTrainedModel, *, profile: str = "exact", scope: str = "attention") -> None:
    """Make a Hugging Face model attend through kvkern; `unpatch` undoes it. No weight and no module changes.

    Args:
        model: a causal LM whose attention goes through transformers' attention interface.
        profile: `exact`: the bits of stock `eager` in bf16.
        scope: `attention`: only attention is ours.

    Raises:
        UnsupportedError: the model, profile or scope is outside what kvkern computes; the message names what.
    """
    if profile != "exact":
        raise UnsupportedError(f"profile {profile!r} is not available: this version has 'exact'")
    if scope != "attention":
        raise UnsupportedError(f"scope {scope!r} is not available: this version has 'attention'")
    require_supported(model)
    register()
    if not is_patched(model.config):
        setattr(model, _PREVIOUS, model.config._attn_implementation)
        model.set_attn_implementation(IMPLEMENTATION)


def unpatch(model: PreTrainedModel) -> None:
    """Select the attention implementation that the model had before `patch`; nothing happens on an unpatched model."""
    if is_patched(model.config):
        model.set_attn_implementation(getattr(model, _PREVIOUS, "sdpa"))


def is_patched(config: Any) -> bool:
    """Return whether a model with this configuration attends through kvkern."""
    return config._attn_implementation == IMPLEMENTATION


def require_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose attention is not plain full causal attention in bf16.

    Raises:
        UnsupportedError: naming the property.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"{name} does not use transformers' attention interface: kvkern cannot reach its attention"
        )
    if model.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"{name} computes in {model.dtype}: kvkern is exact in bfloat16, load it with dtype=torch.bfloat16"
        )
    others = sorted({kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"})
    if others:
        raise UnsupportedError(f"{name} has {', '.join(others)} layers: kvkern computes full causal attention only")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedError(
            f"{name} has a sliding window of {config.sliding_window}: kvkern computes full causal attention only"
        )
    for field, what in (("attn_logit_softcapping", "softcap"), ("use_sinks", "attention sinks")):
        if getattr(config, field, None):
            raise UnsupportedError(
                f"{name} uses {what} ({field}={getattr(config, field)!r}): kvkern does not compute it"
            )
    if not getattr(config, "is_causal", True):
        raise UnsupportedError(f"{name} is not causal: kvkern computes causal attention only")
