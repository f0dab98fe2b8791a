"""Forward hooks and replaced forwards: which leave a module's result alone, told by type, and which are foreign."""

from __future__ import annotations

import functools
import sys
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    Forward = Callable[..., Any]

_OWN: set[Any] = set()
_TORCH = ("add", "bmm", "cat", "cos", "einsum", "matmul", "mean", "mul", "outer", "pow", "rsqrt", "sin", "softmax")
# Methods by which a module computes and tells its weights.
_METHODS = frozenset(
    {"__init__", "__call__", "_call_impl", "__getattr__", "forward", "state_dict", "_save_to_state_dict"}
)
_HARMLESS_HOOKS = frozenset(
    {
        ("transformers", "output_capturing_hook"),
        ("transformers", "make_inputs_require_grads"),
        ("peft", "make_inputs_require_grad"),
    }
)
# Their modules and functions are known by the model's configuration and by the versions in use.
_KNOWN_PACKAGES = frozenset({"transformers", "torch", "accelerate", "peft", "kvkern"})


def kvkern_forward(function: Forward) -> Forward:
    """Mark a function that `patch(scope="model")` puts in the place of a module's forward."""
    _OWN.add(function)
    return function


def is_kvkern_forward(module: nn.Module) -> bool:
    """Tell whether a module's forward is one of kvkern's."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in _OWN


def foreign_code(model: nn.Module, packages: frozenset[str] = frozenset()) -> str | None:
    """Find code that no spec names and that may change what a model computes.

    Args:
        model: the model.
        packages: that may define modules of it, besides transformers, torch, accelerate and peft.

    Returns:
        Where and what, in words, for the first that is found; None when there is none. Hooks of transformers' output
        capture, accelerate's placement hooks, kvkern's forwards and `torch.compile` around a class's own forward are
        known and are passed over.
    """
    everywhere = _foreign_everywhere(_KNOWN_PACKAGES | packages)
    if everywhere is not None:
        return everywhere
    kinds: set[type] = set()
    for name, module in model.named_modules():
        found = _foreign_on(module, _KNOWN_PACKAGES | packages)
        if found is None and type(module) not in kinds:
            kinds.add(type(module))
            found = _foreign_in_class(type(module), _KNOWN_PACKAGES | packages)
        if found is not None:
            return f"{type(model).__name__}{f'.{name}' if name else ''} has {found}"
    return None


def hook_of(module: nn.Module) -> str | None:
    """Describe the first forward hook of a module that may change its result, or None."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if not _is_harmless(hook):
            return f"a forward hook ({_name_of(hook)})"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Tell whether `torch.compile` wraps this module or its forward."""
    return (
        is_compile_wrapper(module)
        or module._compiled_call_impl is not None
        or _compiled_original(module.__dict__.get("forward")) is not None
    )


def is_compile_wrapper(module: nn.Module) -> bool:
    """Tell whether a module is what `torch.compile(module)` returns; the module itself is its `_orig_mod`."""
    return type(module).__module__ == "torch._dynamo.eval_frame" and "_orig_mod" in module._modules


def is_placement(module: nn.Module) -> bool:
    """Tell whether accelerate's placement hook wraps a module's own forward (`device_map`, offload)."""
    forward, hook = module.__dict__.get("forward"), module.__dict__.get("_hf_hook")
    if not isinstance(forward, functools.partial) or not _is_placement_hook(hook):
        return False
    return forward.func.__module__ == "accelerate.hooks" and _is_own_or_kvkerns(module, module.__dict__["_old_forward"])


def _foreign_everywhere(packages: frozenset[str]) -> str | None:
    """Find what changes all models of this process: global hooks, functions of torch, modes of this thread."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "torch.nn.Module has a forward hook for all modules"
    known = packages | {"typing_extensions"} | sys.stdlib_module_names
    used = {**vars(torch.nn.functional), **{name: getattr(torch, name) for name in _TORCH}}
    for name, value in used.items():
        if type(value) is FunctionType and any(package_of(f) not in known for f in wrapped_chain(value)):
            return f"torch's {name} has been replaced ({_name_of(value)})"
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if package_of(type(mode)) != "torch":
            return f"a mode of torch is on ({_name_of(type(mode))})"
    return None


def _foreign_on(module: nn.Module, packages: frozenset[str]) -> str | None:
    own = module.__dict__
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and package_of(type(tensor)) not in packages:
            return f"a tensor of the class {_name_of(type(tensor))} as its {name}"
    for held in (module._parameters, module._buffers, module._modules):
        if shadowed := own.keys() & held.keys():
            return f"an attribute in the place of its {min(shadowed)}"
    if changed := (own.keys() & _METHODS) - {"forward"}:
        return f"a {min(changed)} of its own"
    for hook in (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()):
        if package_of(getattr(hook, "__func__", hook)) not in packages:
            return f"a hook of its state dict ({_name_of(hook)})"
    compiled = module._compiled_call_impl
    if compiled is not None:
        original = getattr(_compiled_original(compiled), "__func__", None)
        if original is not torch_module.Module._call_impl:
            return f"a compiled call of its own ({_name_of(compiled)})"
    forward = module.__dict__.get("forward")
    if forward is not None and not (is_kvkern_forward(module) or is_placement(module) or is_compile_wrapper(module)):
        original = _compiled_original(forward)
        if original is None or not _is_own_or_kvkerns(module, original):
            return f"a forward of its own ({_name_of(forward)})"
    if "parametrizations" in module._modules:
        return "a parametrization"
    return hook_of(module)


def _is_own_or_kvkerns(module: nn.Module, forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and (function is type(module).forward or function in _OWN)


def _compiled_original(forward: Any) -> Any:
    return getattr(forward, "_torchdynamo_orig_callable", None)


def _is_placement_hook(hook: Any) -> bool:
    if type(hook).__module__ != "accelerate.hooks":
        return False
    if type(hook).__name__ == "SequentialHook":
        return all(map(_is_placement_hook, hook.hooks))
    return type(hook).__name__ in ("AlignDevicesHook", "CpuOffload")


def _is_harmless(hook: Any) -> bool:
    """Tell whether a hook is transformers' output capture, or the one that checkpointing puts on embeddings."""
    return isinstance(hook, FunctionType) and (package_of(hook), hook.__name__) in _HARMLESS_HOOKS


def _foreign_in_class(kind: type[nn.Module], packages: frozenset[str]) -> str | None:
    """Find a method, or a function that a forward calls, which another package has put into the model's code."""
    if package_of(kind) not in packages:
        return f"the class {_name_of(kind)} of another package"
    for name in _METHODS:
        owner = next(base for base in kind.__mro__ if name in base.__dict__ or base is object)
        for function in wrapped_chain(owner.__dict__.get(name)):
            if package_of(function) not in packages:
                return f"a {name} that {_name_of(function)} has replaced in {owner.__name__}"
    seen: set[Any] = set()
    for function in wrapped_chain(kind.forward):
        found = _foreign_call(function, packages, seen)
        if found is not None:
            return f"a forward that calls {found}"
    return None


def _foreign_call(function: FunctionType, packages: frozenset[str], seen: set[Any]) -> str | None:
    """Find a function of another package among those that a function of a model's own module calls, and so on."""
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if not isinstance(called, FunctionType) or called in seen:
            continue
        seen.add(called)
        for link in wrapped_chain(called):
            if package_of(link) not in packages:
                return _name_of(link)
            if ".models." in link.__globals__.get("__name__", ""):
                found = _foreign_call(link, packages, seen)
                if found is not None:
                    return found
    return None


def wrapped_chain(function: Any) -> Iterator[FunctionType]:
    """Yield a function, what it wraps, and so on: `functools.wraps` copies names, not code."""
    while function is not None:
        if isinstance(function, FunctionType):
            yield function
        function = getattr(function, "__wrapped__", None)


def package_of(thing: Any) -> str:
    """Name the top-level package that defines a class, or in which a function's code stands."""
    home = thing.__globals__.get("__name__") if isinstance(thing, FunctionType) else getattr(thing, "__module__", None)
    return (home or "").partition(".")[0]


def _name_of(thing: Any) -> str:
    if isinstance(thing, MethodType):
        thing = thing.__func__
    if isinstance(thing, functools.partial):
        thing = thing.func
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{getattr(thing, '__module__', None) or type(thing).__module__}.{name}"
