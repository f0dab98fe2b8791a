"""A model of the same weights that attends by another implementation; the given model is not touched."""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

from kvkern.model_patch.forwards import is_compile_wrapper, is_kvkern_forward, is_placement

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def attending_by(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return a model that shares every weight with `model` and attends by `implementation`, not compiled.

    Modules and configurations are copied, tensors are not, so threads may go on with `model` meanwhile, and what a
    forward leaves on modules, such as frequencies of dynamic RoPE, is not left on `model`.

    Args:
        model: whose forwards and hooks `as_configured` has accepted.
        implementation: a name of transformers' attention interface.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) not in configs:
            _copy_config(config, configs)
    twin = _copy_module(model, configs, {})
    twin.set_attn_implementation(implementation)
    return twin


def _copy_config(config: Any, configs: dict[int, Any]) -> None:
    """Copy a configuration; those inside of it are copied once, and found again by what they were copied from."""
    memo: dict[int, Any] = {}
    configs[id(config)] = copy.deepcopy(config, memo)
    for value in vars(config).values():
        if id(value) in memo and hasattr(value, "_attn_implementation"):
            configs[id(value)] = memo[id(value)]


def _copy_module(module: nn.Module, configs: dict[int, Any], copied: dict[int, nn.Module]) -> Any:
    while is_compile_wrapper(module):
        module = module._orig_mod
    if id(module) in copied:
        return copied[id(module)]
    twin = copied[id(module)] = type(module).__new__(type(module))
    state = twin.__dict__
    state.update(module.__dict__)
    for name in ("_parameters", "_buffers"):
        state[name] = dict(module.__dict__[name])
    state["_modules"] = {
        name: None if child is None else _copy_module(child, configs, copied) for name, child in module._modules.items()
    }
    if id(state.get("config")) in configs:
        state["config"] = configs[id(state["config"])]
    if is_placement(module):
        state["forward"] = functools.partial(state["forward"].func, twin)
        state["_old_forward"] = MethodType(state["_old_forward"].__func__, twin)
    elif is_kvkern_forward(module):
        state["forward"] = MethodType(state["forward"].__func__, twin)
    else:
        state.pop("forward", None)  # a compile wrapper around the class's own
    state["_compiled_call_impl"] = None
    return twin
