"""Forward hooks and replaced forwards: which leave a module's result alone, told by type, and which are foreign."""

from __future__ import annotations

import functools
import inspect
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    Forward = Callable[..., Any]

_OWN: set[Any] = set()
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
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "torch.nn.Module has a forward hook for all modules"
    kinds: set[type] = set()
    for name, module in model.named_modules():
        found = _foreign_on(module)
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


def _foreign_on(module: nn.Module) -> str | None:
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
    """Find a class, a forward, or a function that it calls, which another package has put into the model's code."""
    if package_of(kind) not in packages:
        return f"the class {_name_of(kind)} of another package"
    owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    function = _unwrapped(owner.__dict__["forward"])
    if function is None:
        return None
    if package_of(function) != package_of(owner):
        return f"a forward that {_name_of(function)} has replaced in {owner.__name__}"
    for called in _functions_called(function):
        if package_of(called) not in packages:
            return f"a forward that calls {_name_of(called)}"
    return None


def _functions_called(function: FunctionType) -> Iterator[FunctionType]:
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType):
            yield _unwrapped(called) or called


def _unwrapped(function: Any) -> FunctionType | None:
    function = inspect.unwrap(function)
    return function if isinstance(function, FunctionType) else None


def package_of(thing: Any) -> str:
    """Name the top-level package that defines a class or a function."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _name_of(thing: Any) -> str:
    if isinstance(thing, MethodType):
        thing = thing.__func__
    if isinstance(thing, functools.partial):
        thing = thing.func
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{getattr(thing, '__module__', None) or type(thing).__module__}.{name}"
