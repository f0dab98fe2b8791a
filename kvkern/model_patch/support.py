"""What kvkern computes of a model's attention: full causal attention, judged by its configuration and its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    if any(module.__dict__.get("is_causal") is False for module in model.modules()):
        return "has attention that is not causal"
    return None
