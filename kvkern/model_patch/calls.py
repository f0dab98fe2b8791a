"""How a model's attention modules call transformers' attention interface: which eager function, which arguments."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from kvkern.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

HARMLESS = frozenset(
    {
        "tokenizer",
        "assistant_tokenizer",
        "position_ids",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "return_dict",
        "position_embeddings",
        "is_causal",  # False is refused
    }
)
"""Keyword arguments of transformers that do not change what attention computes. generate() hands on the tokenizers that
it was given, for stop strings, with whatever it does not know."""

_STANDARD = frozenset({"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal"})
_PLAIN = (ast.Constant, ast.Attribute, ast.Name, ast.Load, ast.Call, ast.IfExp, ast.UnaryOp, ast.Not)


@dataclass(frozen=True)
class Call:
    """A call of the attention interface by one module.

    Attributes:
        module: the attention module.
        function: what it calls under `attn_implementation="eager"`.
        keywords: its own arguments beside the standard ones, such as softcap, where they can be known before a forward;
            None and False are left out.
    """

    module: nn.Module
    function: Callable[..., Any]
    keywords: dict[str, Any]


def attention_calls(model: PreTrainedModel) -> list[Call]:
    """Return the calls of all causal attention modules of a model.

    Raises:
        UnsupportedError: no module calls the interface, the eager function of one cannot be found, or one computes
            under `eager` what it does not compute under another implementation.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []
    for name, module in model.named_modules():
        site = _call_site(type(module))
        if site is None or not getattr(module, "is_causal", True):
            continue
        where = f"{type(model).__name__}.{name} ({type(module).__name__})"
        if site.branches_on_eager and getattr(module, "reorder_and_upcast_attn", True):
            raise UnsupportedError(
                f"{where} computes something else under 'eager' than under other implementations, such as sparse "
                "attention or float32 scores: kvkern cannot stand in for it"
            )
        own = site.function
        if own is None:
            raise UnsupportedError(
                f"{where}: its eager attention function cannot be found, so kvkern cannot compare its own with it"
            )
        function = ALL_ATTENTION_FUNCTIONS.get_interface("eager", own)
        calls.append(Call(module, function, dict(_keywords(module, site.keywords))))
    if not calls:
        raise UnsupportedError(
            f"{type(model).__name__} has no causal attention that goes through transformers' attention interface"
        )
    return calls


def require_plain_arguments(calls: list[Call]) -> None:
    """Refuse modules that pass attention an argument that kvkern would refuse in the first forward.

    Raises:
        UnsupportedError: naming the module's class and the argument.
    """
    for call in calls:
        for name, value in call.keywords.items():
            if name not in HARMLESS:
                given = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name
                raise UnsupportedError(f"{type(call.module).__name__} attends with {given}: kvkern does not compute it")


@dataclass(frozen=True)
class _Site:
    """Where a class calls the interface: the names that the method uses, in its module, and the call's own keywords."""

    names: tuple[str, ...]
    module_globals: dict[str, Any]
    branches_on_eager: bool
    keywords: tuple[tuple[str, ast.expr], ...]

    @property
    def function(self) -> Callable[..., Any] | None:
        """The eager function that the module holds now: by its name, else by its first parameter."""
        known = {name: self.module_globals.get(name) for name in self.names}
        functions = {name: value for name, value in known.items() if callable(value) and not isinstance(value, type)}
        named = [value for name, value in functions.items() if "eager" in name]
        choices = named or [value for value in functions.values() if _takes_a_module(value)]
        return choices[0] if len(choices) == 1 else None


@functools.lru_cache(maxsize=512)
def _call_site(kind: type[nn.Module]) -> _Site | None:
    """Find where a class of modules calls the attention interface, in its methods and those that it inherits."""
    from transformers import AttentionInterface, PreTrainedModel

    owners = [owner for owner in kind.__mro__ if owner not in PreTrainedModel.__mro__]
    for name in dict.fromkeys(name for owner in owners for name in vars(owner)):
        method = inspect.unwrap(getattr(kind, name)) if callable(getattr(kind, name, None)) else None
        if not isinstance(method, FunctionType):
            continue
        codes = list(_codes(method.__code__))
        names = dict.fromkeys(name for code in codes for name in (*code.co_names, *code.co_freevars))
        if not any(isinstance(method.__globals__.get(name), AttentionInterface) for name in names):
            continue
        # Before `get_interface`, a module compared with "eager" to choose the function itself: no other branch.
        compares = any("eager" in _strings(code.co_consts) for code in codes) and "get_interface" in names
        return _Site(tuple(names), method.__globals__, compares, tuple(_keyword_expressions(method)))
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _strings(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(tuple(constant))


def _takes_a_module(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return parameters[:1] == ["module"] and "attention_mask" in parameters


def _keyword_expressions(method: FunctionType) -> Iterator[tuple[str, ast.expr]]:
    """Yield the keyword arguments of each call `local_variable(self, ...)`: the interface is called like that."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return  # code without a source: what it passes is judged in its first forward
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        first = node.args[0]
        if isinstance(first, ast.Name) and first.id == "self" and node.func.id not in method.__globals__:
            yield from ((word.arg, word.value) for word in node.keywords if word.arg not in (None, *_STANDARD))


def _keywords(module: nn.Module, expressions: tuple[tuple[str, ast.expr], ...]) -> Iterator[tuple[str, Any]]:
    for name, expression in expressions:
        value = _value(expression, module)
        if value is not None and value is not False:
            yield name, value


def _value(expression: ast.expr, module: nn.Module) -> Any:
    """Evaluate an expression of constants and attributes of `self`; None for any other."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Name) and node.id not in ("self", "getattr"):
            return None
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == "getattr"):
            return None
        if not isinstance(node, _PLAIN):
            return None
    try:
        return eval(compile(ast.Expression(expression), "<argument>", "eval"), {"getattr": getattr}, {"self": module})
    except AttributeError:
        return None
