"""Put kvkern's attention and mask into transformers' registries, and select or deselect them on a model."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvkern.errors import UnsupportedError
from kvkern.model_patch import whole
from kvkern.model_patch.eager_form import require_form
from kvkern.model_patch.rope import give_rope_table
from kvkern.model_patch.support import require_supported
from kvkern.probe import stock_order
from kvkern.waived import waive, withdraw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from kvkern.tables import RopeTable

IMPLEMENTATION = "kvkern"
CONTRACT_IMPLEMENTATION = "kvkern_contract"
FAST_IMPLEMENTATION = "kvkern_fast"
LONG_RUN_IMPLEMENTATION = "kvkern_run1024"
"""Attention in runs of 1,024 keys at any length: recomputes part of a long prefill of stock."""
SCOPES = {"attention": IMPLEMENTATION, "model": CONTRACT_IMPLEMENTATION}
_NAMES = (*SCOPES.values(), FAST_IMPLEMENTATION, LONG_RUN_IMPLEMENTATION)
_PREVIOUS = "_kvkern_previous_implementation"
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def register() -> None:
    """Register attention and mask in transformers, under a name for each scope and profile; safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from kvkern.model_patch.attention import (
        attention_forward,
        contract_attention_forward,
        fast_attention_forward,
        long_run_attention_forward,
    )
    from kvkern.model_patch.masks import padding_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionInterface.register(CONTRACT_IMPLEMENTATION, contract_attention_forward)
    AttentionInterface.register(FAST_IMPLEMENTATION, fast_attention_forward)
    AttentionInterface.register(LONG_RUN_IMPLEMENTATION, long_run_attention_forward)
    for name in _NAMES:
        AttentionMaskInterface.register(name, padding_mask)


def patch(
    model: PreTrainedModel,
    *,
    profile: str = "exact",
    scope: str = "attention",
    rope_table: RopeTable | None = None,
    allow_other_bits: bool = False,
) -> None:
    """Make a Hugging Face model compute through kvkern; `unpatch` undoes it.

    Args:
        model: a causal LM whose attention goes through transformers' attention interface.
        profile: `exact`: the bits of stock `eager` in bf16. `fast`: tensor cores of a GPU, bits of its own, for scope
            `attention` only.
        scope: `attention`: only attention is ours, with the run rule of stock; no weight and no module changes.
            `model`: every operation of a Qwen3 or Llama follows the numeric contract, so that KV and logits are a
            function of weights and tokens alone; the weights of Linear are laid out anew, in place.
        rope_table: for scope `model` on a host whose torch does not follow the contract: `store.rope_table(digest)`.
        allow_other_bits: patch a model whose own eager attention rounds elsewhere than stock eager, such as GPT-2's
            softmax in bf16, and compute stock eager's bits instead of its own. `resolve` then says so. Under `fast`
            such a model needs no permission. A model that computes another function (softcap, sinks) is refused always.

    Raises:
        UnsupportedError: the model, profile or scope is outside what kvkern computes, or the model's own eager
            attention is not stock eager's; the message names what.
    """
    if profile not in ("exact", "fast"):
        raise UnsupportedError(f"profile {profile!r} is not available: take 'exact' or 'fast'")
    if scope not in SCOPES:
        raise UnsupportedError(f"scope {scope!r} is not available: take {' or '.join(map(repr, SCOPES))}")
    if rope_table is not None:
        give_rope_table(model, rope_table)
    if profile == "fast":
        _require_fast(model, scope)
    name = FAST_IMPLEMENTATION if profile == "fast" else None
    _select(model, scope, k_major=True, name=name, allow_other_bits=allow_other_bits)
    model.init_continuous_batching = refuse_continuous_batching


def unpatch(model: PreTrainedModel) -> None:
    """Make the model compute as it did before `patch`; nothing happens on an unpatched model."""
    if whole.is_entered(model):
        whole.leave(model)
    if is_patched(model.config):
        model.set_attn_implementation(getattr(model, _PREVIOUS, "sdpa"))
    model.__dict__.pop("init_continuous_batching", None)
    withdraw(model)


def refuse_continuous_batching(*_: Any, **__: Any) -> None:
    """Stand in for a patched model's `init_continuous_batching`, which `generate_batch` begins with.

    transformers would refuse the name `kvkern` or, where FlashAttention is installed, compute that instead.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "generate_batch (continuous batching) on a patched model: it computes transformers' own paged attention and "
        "reads no attached prefix. Call model.generate(**prefix.prepare(rows)) for a batch, or kvkern.unpatch(model) "
        "first."
    )


@contextmanager
def under_contract(model: PreTrainedModel) -> Iterator[None]:
    """Run a model under the contract for a while: scope "model"; one thread of a model at a time.

    Where Linear runs in C, weights are laid out for it meanwhile. Nobody else may run the model until it is over.

    Raises:
        UnsupportedError: an operation is outside the contract; it is named.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        if whole.is_entered(model):
            whole.require_whole(model)
            if model.config._attn_implementation != CONTRACT_IMPLEMENTATION:
                raise UnsupportedError(
                    f"attention is {model.config._attn_implementation!r} on a model of scope 'model': call "
                    "kvkern.unpatch(model) and patch again"
                )
            yield
            return
        before = model.config._attn_implementation
        try:
            _select(model, "model", k_major=model.device.type != "cpu" or not stock_order().follows)
            yield
        finally:
            if whole.is_entered(model):
                whole.leave(model)
            model.set_attn_implementation(before)


def is_patched(config: Any) -> bool:
    """Return whether a model with this configuration attends through kvkern."""
    return config._attn_implementation in _NAMES


def _require_fast(model: PreTrainedModel, scope: str) -> None:
    from kvkern.kernels import fast_door

    if scope != "attention":
        raise UnsupportedError(
            f"profile 'fast' has bits of its own: scope {scope!r} is the contract's, take 'attention'"
        )
    fast_door.require_available(model.device)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in fast_door.HEAD_DIMS:
        raise UnsupportedError(f"head_dim is {head_dim}: profile 'fast' computes 64 and 128, take profile 'exact'")


def _select(
    model: PreTrainedModel, scope: str, *, k_major: bool, name: str | None = None, allow_other_bits: bool = False
) -> None:
    require_supported(model)
    is_fast = name == FAST_IMPLEMENTATION
    form = require_form(model, allow_other_bits=allow_other_bits or is_fast)
    register()
    if whole.is_entered(model):
        whole.leave(model)
    if scope == "model":
        whole.enter(model, k_major=k_major)
    if not is_patched(model.config):
        setattr(model, _PREVIOUS, model.config._attn_implementation)
    model.set_attn_implementation(name or SCOPES[scope])
    if not is_patched(model.config):
        raise UnsupportedError(f"{type(model).__name__} does not let its attention implementation be set")
    withdraw(model)
    if not (form.equal or is_fast):
        waive(model, f"{type(model).__name__}'s own eager ({form.reason})")
