"""Is a model the one that its configuration builds? Its modules, their attributes and buffers are compared by name."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kvkern.errors import UnsupportedError
from kvkern.model_patch.adapters import (
    QUANTIZERS,
    adapted_module,
    base_model,
    is_quantized,
    quantization_change,
    quantization_of,
)
from kvkern.model_patch.forwards import foreign_code, is_compile_wrapper, package_of
from kvkern.model_patch.identity import computing_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
# Attributes that no forward reads in eval mode, or that a forward writes.
_IDLE = frozenset(
    """
    training gradient_checkpointing activation_checkpointing name_or_path loss_type kernel_config max_seq_len_cached
    attention_dropout padding_idx vocab_size
    """.split()  # noqa: SIM905 quoted one by one the names would be harder to read
)
# Attributes that attention functions read from a module even when its class does not set them.
_READ_ANYWAY = ("is_causal", "num_key_value_groups", "sliding_window")
MOST_APART = 2.0**-21
"""Relative difference of a buffer's elements that two mathematical libraries or devices may make in fp32."""


def require_as_configured(model: PreTrainedModel, *, to_publish: bool = False) -> None:
    """Refuse a model that computes something which no field of a KVSpec names.

    Args:
        model: a causal LM, patched or not; adapters, quantisation, accelerate's placement, `torch.compile` are known.
        to_publish: refuse frequencies of dynamic RoPE that an earlier, longer prompt has left, too.

    Raises:
        UnsupportedError: naming the module and the hook, forward, attribute or buffer.
    """
    found = unnamed_change(model) or (_grown_rope(model) if to_publish else None)
    if found is not None:
        raise UnsupportedError(
            f"{found}: no field of the spec names that, so its KV would pass for another computation's. Undo it, or "
            "put it into the configuration or the weights"
        )


def unnamed_change(model: PreTrainedModel) -> str | None:
    """Find the first thing that changes what a model computes and that its spec does not name, in words."""
    root = base_model(model)
    found = foreign_code(model, {package_of(type(root))} | (QUANTIZERS if quantization_of(root) else frozenset()))
    if found is not None:
        return found
    try:
        expected = _expected_of(type(root), _config_key(root.config), _Box(root))
    except Exception as error:  # a constructor may raise anything
        return f"{type(root).__name__} cannot be built from its own configuration ({type(error).__name__}: {error})"
    return quantization_change(root) or _compare(type(root).__name__, root, expected, root)


def require_no_dropout(model: nn.Module) -> None:
    """Refuse to publish from a model whose dropout is on: its KV would be random.

    Raises:
        UnsupportedError: naming the module.
    """
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
        if module.training and isinstance(rate, (int, float)) and rate > 0:
            raise UnsupportedError(f"{name} drops {rate} of its values in training mode: call model.eval()")


@dataclass(frozen=True)
class _Expected:
    """One module as the configuration builds it; buffers are those outside of the state dict."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    config: dict[str, Any] | None
    buffers: dict[str, Tensor]
    children: dict[str, _Expected] = field(default_factory=dict)


class _Box:
    """Carries a model past a cache without being part of its key."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Box)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _expected_of(kind: type[PreTrainedModel], config_key: str, box: _Box) -> _Expected:
    """Build the model without weights; some 10 ms for 30 layers.

    Only this thread may notice: transformers' `no_init_weights` and its default dtype are the whole process's.
    """
    config = copy.deepcopy(box.model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        built = kind(config)
        return _described(built, built, {})


def _described(module: nn.Module, root: PreTrainedModel, configs: dict[int, dict[str, Any]]) -> _Expected:
    config = getattr(module, "config", None)
    if config is not None and id(config) not in configs:
        configs[id(config)] = computing_fields(config)
    return _Expected(
        type(module),
        _attributes(module),
        None if config is None else configs[id(config)],
        _computed_buffers(module, root),
        {name: _described(child, root, configs) for name, child in module.named_children()},
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Scalars, and functions that a module of theirs holds by name."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name not in _IDLE and (isinstance(value, _SCALARS) or _is_named(value))
    }


def _is_named(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):
        return True
    if not isinstance(value, FunctionType):
        return False
    return getattr(sys.modules.get(value.__module__), value.__name__, None) is value


def _computed_buffers(module: nn.Module, root: PreTrainedModel) -> dict[str, Tensor]:
    """Compute the buffers that a state dict does not hold, as transformers does after loading weights."""
    names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
    if not names:
        return {}
    alone = copy.copy(module)
    alone._buffers = {name: _unset(module._buffers[name]) for name in names}
    with torch.device("cpu"), torch.no_grad():
        root._init_weights(alone)
    return {name: value for name, value in alone._buffers.items() if not torch.equal(value, _unset(value))}


def _unset(like: Tensor) -> Tensor:
    """Return a buffer of values that nobody computes."""
    if like.dtype == torch.bool:
        return torch.zeros_like(like, device="cpu")
    info = torch.finfo if like.is_floating_point() else torch.iinfo
    return torch.full_like(like, info(like.dtype).min, device="cpu")


def _compare(where: str, module: nn.Module, expected: _Expected, root: PreTrainedModel) -> str | None:
    """Return what differs first in a module or below it."""
    while is_compile_wrapper(module):
        module = module._orig_mod
    module = adapted_module(module)
    if type(module) is not expected.kind:
        if is_quantized(module, expected.kind, root):
            return None
        return f"{where} is a {_full_name(type(module))}, its configuration gives a {_full_name(expected.kind)}"
    found = _compare_attributes(module, expected) or _compare_config(module, expected, root)
    if found is None:
        found = _compare_buffers(module, expected, root)
    if found is not None:
        return f"{where}{found}"
    for name, child in expected.children.items():
        own = module._modules.get(name)
        if own is None:
            return f"{where} has no module {name!r}, its configuration gives one"
        found = _compare(f"{where}.{name}", own, child, root)
        if found is not None:
            return found
    return None


def _compare_attributes(module: nn.Module, expected: _Expected) -> str | None:
    own = module.__dict__
    for name, value in expected.attributes.items():
        if name not in own or not _is_same(own[name], value):
            return f".{name} is {own.get(name)!r}, its configuration gives {value!r}"
    for name in _READ_ANYWAY:
        if name in own and name not in expected.attributes:
            return f".{name} is {own[name]!r}, its configuration gives none"
    return None


def _is_same(own: Any, value: Any) -> bool:
    return own is value or (isinstance(own, _SCALARS) and own == value)


def _compare_config(module: nn.Module, expected: _Expected, root: PreTrainedModel) -> str | None:
    config = getattr(module, "config", None)
    if expected.config is None or config is root.config:
        return None
    if config._attn_implementation != root.config._attn_implementation and config is not root.config:
        same_kind = type(config) is type(root.config.get_text_config())
        if same_kind:
            return (
                f".config attends by {config._attn_implementation!r}, the model's by "
                f"{root.config._attn_implementation!r}"
            )
    if computing_fields(config) != expected.config:
        return ".config is not the model's"
    return None


def _compare_buffers(module: nn.Module, expected: _Expected, root: PreTrainedModel) -> str | None:
    for name, value in expected.buffers.items():
        own = getattr(module, name, None)
        if own is None or own.shape != value.shape:
            return f".{name} is not what its configuration gives"
        if own.dtype == root.dtype and "inv_freq" not in name and value.is_floating_point():
            value = value.to(own.dtype)  # a model that is built under its dtype has its plain buffers in it
        if own.dtype != value.dtype:
            return (
                f".{name} is {own.dtype}, its configuration gives {value.dtype}: load the model with dtype=, not .to()"
            )
        apart = _apart(own, value)
        if bool(apart.any()) and name == "inv_freq" and (other := _rope_left_by_a_prompt(module)) is not None:
            apart = _apart(own, other)
        if bool(apart.any()):
            return f".{name} differs from its configuration's in {int(apart.sum())} of {value.numel()} elements"
    return None


def _apart(own: Tensor, value: Tensor) -> Tensor:
    return (own.detach().cpu().double() - value.double()).abs() > MOST_APART * value.double().abs()


def rope_of_a_prompt(module: nn.Module, tokens: int) -> Tensor | None:
    """Return the frequencies with which a fresh rotary embedding reads a prompt; None where length does not matter."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = getattr(module, "rope_type", None)
    if kind not in ("dynamic", "longrope"):
        return None
    longest = module.original_max_seq_len
    if kind == "longrope":
        longest = module.config.rope_parameters["original_max_position_embeddings"]
    if tokens <= longest:
        return module.original_inv_freq.clone()
    length = torch.tensor(tokens, device="cpu")  # as a forward has it: torch's arithmetic, not Python's
    return ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=length)[0]


def _rope_left_by_a_prompt(module: nn.Module) -> Tensor | None:
    """Return the frequencies that the longest prompt so far has left; longrope leaves those of any long one."""
    if getattr(module, "rope_type", None) == "longrope":
        return rope_of_a_prompt(module, module.config.rope_parameters["original_max_position_embeddings"] + 1)
    return rope_of_a_prompt(module, int(getattr(module, "max_seq_len_cached", 0)))


def _grown_rope(model: nn.Module) -> str | None:
    """Find dynamic RoPE whose frequencies are those of an earlier prompt; longrope chooses anew in every forward."""
    for name, module in model.named_modules():
        if getattr(module, "rope_type", None) != "dynamic":
            continue
        if bool(_apart(module.inv_freq, module.original_inv_freq.cpu()).any()):
            return f"{name} has the frequencies of an earlier prompt of {int(module.max_seq_len_cached)} tokens"
    return None


def _config_key(config: Any) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
