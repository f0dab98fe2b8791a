"""What kvkern computes of a model's attention: full causal attention, judged by its configuration and its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvkern.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

CAUSAL_FIELDS = frozenset(
    """
    add_cross_attention chunk_size_feed_forward is_decoder layer_types max_window_layers sliding_window
    use_sliding_window
    """.split()  # noqa: SIM905 quoted one by one the names would be harder to read
)
"""Fields of a configuration that change what is computed, unless all together mean full causal attention."""


def other_than_full_causal(model: PreTrainedModel) -> str | None:
    """Say what makes a model's attention another than full causal attention over all of its keys; None if nothing."""
    config = model.config.get_text_config()
    others = sorted({str(kind) for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"})
    if others:
        return f"has {', '.join(others)} layers"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"has a sliding window of {config.sliding_window}"
    if getattr(config, "add_cross_attention", False):
        return "has cross attention (add_cross_attention)"
    if getattr(config, "chunk_size_feed_forward", 0):
        return f"computes its MLP in chunks (chunk_size_feed_forward={config.chunk_size_feed_forward})"
    if not getattr(config, "is_causal", True):
        return "is not causal"
    if any(_is_acausal(module, config) for module in model.modules()):
        return "has attention that is not causal"
    return None


def _is_acausal(module: nn.Module, text_config: Any) -> bool:
    """Tell whether a module of the language model attends to later tokens; one of a vision tower may."""
    own = module.__dict__
    return own.get("is_causal") is False and type(own.get("config", text_config)) is type(text_config)


def require_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose attention is not plain full causal attention in bf16.

    Raises:
        UnsupportedError: naming the property.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"{name} does not support transformers' attention interface (_supports_attention_backend): kvkern cannot "
            "reach its attention"
        )
    if model.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"{name} computes in {model.dtype}: kvkern is exact in bfloat16, load it with dtype=torch.bfloat16"
        )
    _require_own_keys(config, name)
    reason = other_than_full_causal(model)
    if reason is not None:
        raise UnsupportedError(f"{name} {reason}: kvkern computes full causal attention only")
    for field, what in (
        ("attn_logit_softcapping", "softcap"),
        ("use_sinks", "attention sinks"),
        ("keep_window_size", "a mask of its own"),
    ):
        if getattr(config, field, None):
            raise UnsupportedError(
                f"{name} uses {what} ({field}={getattr(config, field)!r}): kvkern does not compute it"
            )


def _require_own_keys(config: Any, name: str) -> None:
    """Refuse layers without keys of their own or of several shapes, and values of another width than their keys."""
    fields = {}
    for field in ("kv_lora_rank", "head_dim", "v_head_dim", "num_kv_shared_layers"):
        try:
            fields[field] = getattr(config, field, None)
        except RuntimeError:  # transformers names no single value where layers have several
            raise UnsupportedError(
                f"{name} has a {field} that differs from layer to layer: kvkern needs layers of one shape"
            ) from None
    if fields["kv_lora_rank"]:
        raise UnsupportedError(
            f"{name} has multi-head latent attention (MLA, kv_lora_rank={fields['kv_lora_rank']}): kvkern computes and "
            "publishes full keys and values of one head_dim"
        )
    key_dim, value_dim = fields["head_dim"], fields["v_head_dim"]
    if key_dim and value_dim and value_dim != key_dim:
        raise UnsupportedError(
            f"{name} has value head_dim {value_dim} and key head_dim {key_dim}: kvkern needs them equal"
        )
    if fields["num_kv_shared_layers"]:
        raise UnsupportedError(
            f"{name} has {fields['num_kv_shared_layers']} layers that share keys and values with others: each layer "
            "must have its own"
        )
