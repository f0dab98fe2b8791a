"""Scope "model": every operation of a Qwen3 or Llama under the contract; nothing in transformers is edited."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvkern import operations
from kvkern.contract import NORM_WIDTH_LIMIT, NORM_WIDTH_STEP
from kvkern.errors import UnsupportedError
from kvkern.model_patch.forwards import hook_of, is_compiled, is_kvkern_forward, kvkern_forward
from kvkern.model_patch.gradients import refuse_gradient
from kvkern.model_patch.rope import require_trusted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern.tables import RopeTable

    Forward = Callable[..., Any]  # takes the module first

_HOMES = ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3")
_CONTAINERS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP")
_UNDO = "_kvkern_whole"
_TABLE = "_kvkern_rope_table"


def enter(model: PreTrainedModel, *, k_major: bool) -> None:
    """Put every module that computes under the contract.

    Args:
        model: a Qwen3 or Llama.
        k_major: lay the weights out for decode, in place: the same values, names and shapes, other strides.

    Raises:
        UnsupportedError: an operation is outside the contract; it is named, and nothing has been changed.
    """
    forwards = contract_forwards(model)
    laid_out: list[str] = []
    setattr(model, _UNDO, laid_out)
    try:
        for name, module in model.named_modules() if k_major else ():
            if type(module) is nn.Linear and not operations.is_k_major(module.weight):
                module.weight.data = operations.to_k_major(module.weight.data)
                laid_out.append(name)
        for module, forward in forwards.items():
            module.forward = MethodType(forward, module)
    except BaseException:
        leave(model)
        raise


def leave(model: PreTrainedModel) -> None:
    """Undo what `enter` did, and nothing else."""
    for module in model.modules():
        if is_kvkern_forward(module):
            del module.forward
        module.__dict__.pop(_TABLE, None)
    for name in getattr(model, _UNDO):
        weight = model.get_submodule(name).weight
        weight.data = weight.data.contiguous()
    delattr(model, _UNDO)


def is_entered(model: PreTrainedModel) -> bool:
    """Tell whether the whole model is under the contract."""
    return hasattr(model, _UNDO)


def require_whole(model: PreTrainedModel) -> None:
    """Refuse a model that was changed after it was entered.

    Raises:
        UnsupportedError: an operation is not, or no longer, under the contract; it is named.
    """
    for module in contract_forwards(model):
        if not is_kvkern_forward(module):
            name = next(name for name, found in model.named_modules() if found is module)
            raise UnsupportedError(
                f"{type(model).__name__}.{name} has come after kvkern.patch: call kvkern.unpatch(model) and patch again"
            )


def contract_forwards(model: PreTrainedModel) -> dict[nn.Module, Forward]:
    """Return the forward under the contract of each module that needs one.

    Raises:
        UnsupportedError: a module or a property is outside the contract; its name is in the message.
    """
    forwards: dict[nn.Module, Forward] = {}
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        _require_plain(module, where)
        kind, home = type(module).__name__, type(module).__module__
        for own, tensor in module.named_parameters(recurse=False):
            if tensor.dtype != torch.bfloat16:
                _refuse(f"{where}.{own}", tensor.dtype, "bfloat16 weights")
        if type(module) is nn.Linear:
            if module.bias is not None:
                _refuse(where, "a Linear with a bias", "Linear without a bias")
            forwards[module] = _linear
        elif home in _HOMES and kind.endswith("RMSNorm"):
            width = module.weight.shape[0]
            if width % NORM_WIDTH_STEP or width >= NORM_WIDTH_LIMIT:
                _refuse(where, f"width {width}", f"multiples of {NORM_WIDTH_STEP} under {NORM_WIDTH_LIMIT}")
            if module.variance_epsilon != config.rms_norm_eps:
                _refuse(where, f"eps {module.variance_epsilon}", f"the configuration's {config.rms_norm_eps}")
            forwards[module] = _norm
        elif home in _HOMES and kind.endswith("RotaryEmbedding"):
            module.__dict__[_TABLE] = require_trusted(model)
            forwards[module] = _rotary
        elif kind in ("SiLUActivation", "SiLU"):
            forwards[module] = _silu
        elif type(module) not in (nn.Embedding, nn.ModuleList) and not (home in _HOMES and kind.endswith(_CONTAINERS)):
            _refuse(where, f"a {kind}", "Qwen3 and Llama with Linear, RMSNorm, RoPE and SiLU")
    return forwards


def _require_plain(module: nn.Module, where: str) -> None:
    """Refuse what would compute something beside, or instead of, the module's own forward."""
    if "forward" in module.__dict__ and not is_kvkern_forward(module):
        _refuse(where, "a forward of its own", "modules as transformers makes them")
    if (hook := hook_of(module)) is not None:
        _refuse(where, hook, "modules without hooks that may change what is computed")
    if is_compiled(module):
        _refuse(where, "a compiled module", "modules that are not compiled")
    scaling, head_dim = getattr(module, "scaling", None), getattr(module, "head_dim", None)
    if scaling is not None and head_dim is not None and scaling != head_dim**-0.5:
        _refuse(where, f"scaling {scaling}", f"{head_dim**-0.5}")


@kvkern_forward
def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    if self.training:
        raise UnsupportedError("training under scope 'model': kvkern computes no gradients, call model.eval()")
    out = operations.linear(x.detach(), self.weight.detach())
    return refuse_gradient(out, x, self.weight, what="Linear")


@kvkern_forward
def _norm(self: Any, x: Tensor) -> Tensor:
    out = operations.rms_norm(x, self.weight, self.variance_epsilon)
    return refuse_gradient(out, x, self.weight, what="RMSNorm")


@kvkern_forward
def _silu(self: nn.Module, x: Tensor) -> Tensor:
    return refuse_gradient(operations.silu(x), x, what="SiLU")


@kvkern_forward
def _rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    table: RopeTable = self.__dict__[_TABLE]
    positions = table.cos.shape[0]
    if position_ids.device.type == "cpu" and not 0 <= int(position_ids.min()) <= int(position_ids.max()) < positions:
        raise UnsupportedError(
            f"positions {int(position_ids.min())} to {int(position_ids.max())} are not all in the RoPE table's 0 to "
            f"{positions - 1}: the contract covers 0 .. max_position_embeddings - 1"
        )
    if table.cos.device != x.device:
        table = self.__dict__[_TABLE] = type(table)(table.cos.to(x.device), table.sin.to(x.device))
    return tuple(part[position_ids].repeat(1, 1, 2) for part in (table.cos, table.sin))


def _refuse(where: str, given: object, allowed: str) -> None:
    raise UnsupportedError(
        f"{where}: {given} is outside the numeric contract, which covers {allowed}. Take scope 'attention' or producer "
        "'stock'."
    )
