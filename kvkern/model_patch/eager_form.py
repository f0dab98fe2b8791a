"""Is a model's own eager attention stock's? Its function is run once on witness rows, and its bits are compared."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvkern.errors import UnsupportedError
from kvkern.model_patch.calls import Call, attention_calls, require_plain_arguments
from kvkern.model_patch.witness import HEAD_DIM, Witness, differing, known_form, stock_output, witnesses

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedModel

_SCALARS = (bool, int, float, str, type(None))
_ABSENT = "no such attribute"
_GIVEN = {"training": False, "head_dim": HEAD_DIM}
_WORDS = {"softcap": "a softcap of the scores", "sinks": "attention sinks", "s_aux": "attention sinks"}


@dataclass(frozen=True)
class Form:
    """How a model's own eager attention compares with stock eager's.

    Attributes:
        function: its name, with the module that defines it.
        equal: no bit differs on the witness rows.
        rounds_elsewhere: bits differ, but no more than rounding in another place makes: the same mathematical function.
        reason: what differs, in words.
    """

    function: str
    equal: bool
    rounds_elsewhere: bool
    reason: str


def check_form(model: PreTrainedModel) -> Form:
    """Compare the eager attention of a model's modules with stock eager's, once a function.

    Args:
        model: a causal LM; its device is where the form is judged.

    Returns:
        The form of the first module that is least like stock eager. What is found of a function is kept.

    Raises:
        UnsupportedError: a module's eager function cannot be found, or has a rival in the module.
    """
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    forms: list[Form] = []
    seen: dict[Any, list[_Judged]] = {}
    for call in attention_calls(model):
        form = _form_of(call, device, seen)
        if form not in forms:
            forms.append(form)
    return min(forms, key=lambda form: (form.equal, form.rounds_elsewhere))


def require_form(model: PreTrainedModel, *, allow_other_bits: bool = False) -> Form:
    """Refuse a model whose own eager attention is not stock's.

    Args:
        model: a causal LM.
        allow_other_bits: take a form that only rounds elsewhere.

    Returns:
        The form.

    Raises:
        UnsupportedError: naming the function and what differs, or an argument that kvkern does not compute.
    """
    form = check_form(model)
    if not form.equal and not (allow_other_bits and form.rounds_elsewhere):
        remedy = (
            "kvkern computes the same attention with stock eager's bits; to go on with those, "
            "kvkern.patch(model, allow_other_bits=True)"
            if form.rounds_elsewhere
            else "kvkern does not compute that: leave the model unpatched"
        )
        raise UnsupportedError(
            f"{type(model).__name__}: its own eager attention, {form.function}, is not stock eager: {form.reason}. "
            f"{remedy}"
        )
    require_plain_arguments(attention_calls(model))
    return form


@dataclass(frozen=True)
class _Judged:
    """A form, and the attributes of the module that the function has read: with other values it may be another."""

    form: Form
    attributes: dict[str, Any]

    def applies_to(self, module: nn.Module) -> bool:
        return all(_same(value, getattr(module, name, _ABSENT)) for name, value in self.attributes.items())


_JUDGED: weakref.WeakKeyDictionary[Any, dict[Any, list[_Judged]]] = weakref.WeakKeyDictionary()


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, _SCALARS) and type(a) is type(b) and a == b)


def _form_of(call: Call, device: torch.device, seen: dict[Any, list[_Judged]]) -> Form:
    """Return a function's form from this check, from an earlier one, or by running it."""
    key = (device.type, *sorted((name, _key(value)) for name, value in call.keywords.items()))
    kept = _JUDGED.setdefault(call.function, {})
    mine = seen.setdefault((call.function, key), [])
    for judged in (*kept.get(key, ()), *mine):
        if judged.applies_to(call.module):
            return judged.form
    judged = _judge(call, device)
    mine.append(judged)
    if all(isinstance(value, _SCALARS) for value in (*judged.attributes.values(), *call.keywords.values())):
        kept.setdefault(key, []).append(judged)  # a tensor belongs to one model, and may change: it is judged again
    return judged.form


def _key(value: Any) -> Any:
    return repr(value) if isinstance(value, _SCALARS) else f"{type(value).__name__} at {id(value)}"


class _Stub:
    """Stands in for the attention module: it answers with the module's attributes, and remembers which were read."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._read: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in _GIVEN:
            return _GIVEN[name]
        value = self._read[name] = getattr(self._module, name, _ABSENT)
        if value is _ABSENT:
            raise AttributeError(f"{type(self._module).__name__} has no attribute {name!r}")
        return value


def _judge(call: Call, device: torch.device) -> _Judged:
    """Run a function on all witness calls and compare."""
    calls = witnesses(*_heads(call.module), device)
    if not _has_default_scaling(call.function):
        calls = [witness for witness in calls if witness.scaling is not None]
    stub = _Stub(call.module)
    try:
        with torch.inference_mode():
            outputs = [_run(call, stub, witness) for witness in calls]
    except Exception as error:  # noqa: BLE001 the function is anybody's code: whatever it raises, it was not compared
        reason = f"it cannot be run on the witness rows ({type(error).__name__}: {error})"
        return _Judged(Form(_name(call.function), False, False, reason), stub._read)
    with torch.inference_mode():
        form = _compare(call, stub._read, calls, outputs)
    return _Judged(form, stub._read)


def _heads(module: nn.Module) -> tuple[int, int]:
    """Return query and KV heads: the module's own, which its sinks may have too, or one KV head's group."""
    groups = getattr(module, "num_key_value_groups", 1)
    try:
        heads = getattr(getattr(module, "config", None), "num_attention_heads", groups)
    except RuntimeError:  # a configuration whose layers differ
        heads = groups
    if not isinstance(heads, int) or heads % groups:
        heads = groups
    return heads, heads // groups


def _run(call: Call, stub: _Stub, w: Witness) -> Tensor:
    scaling = {} if w.scaling is None else {"scaling": w.scaling}
    out = call.function(stub, w.q, w.k, w.v, w.mask, dropout=0.0, **scaling, **call.keywords)[0]
    batch, heads, rows, width = w.q.shape
    if tuple(out.shape) != (batch, rows, heads, width) or out.dtype != torch.bfloat16:
        raise ValueError(f"it returned {out.dtype} {tuple(out.shape)}")
    return out


def _has_default_scaling(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("scaling")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is None


def _compare(call: Call, read: dict[str, Any], calls: list[Witness], outputs: list[Tensor]) -> Form:
    name = _name(call.function)
    differ, count, first, is_rounding = 0, 0, "", True
    for witness, out in zip(calls, outputs, strict=True):
        stock = stock_output(witness)
        wrong = differing(out, stock)
        differ, count = differ + int(wrong.sum()), count + int((stock != 0).sum())
        if not first and wrong.any():
            first = f"the first is {float(out[wrong][0]):.8g} where stock eager has {float(stock[wrong][0]):.8g}"
        distance = (out.float() - stock.float()).abs()
        is_rounding &= bool((distance <= witness.tolerance * stock.float().abs() + 2.0**-20).all())
    if not differ:
        return Form(name, True, False, "its bits are stock eager's on the witness rows")
    named = [_WORDS.get(word, f"its argument {word}") for word in call.keywords if word in _WORDS]
    named += [_WORDS.get(word, f"module.{word}") for word, value in read.items() if isinstance(value, torch.Tensor)]
    what = known_form(outputs, calls) or " and ".join(dict.fromkeys(named)) or "another form"
    return Form(name, False, is_rounding, f"{what}; {differ:,} of {count:,} outputs differ, {first}")


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
