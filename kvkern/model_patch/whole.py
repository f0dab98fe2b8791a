"""Scope "model": every operation of a Qwen3 or Llama under the contract; nothing in transformers is edited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvkern import operations
from kvkern.contract import NORM_WIDTH_LIMIT, NORM_WIDTH_STEP
from kvkern.errors import UnsupportedError
from kvkern.model_patch.rope import require_trusted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern.tables import RopeTable

    Forward = Callable[..., Any]

_HOMES = ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3")
_CONTAINERS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP")
_UNDO = "_kvkern_whole"


def enter(model: PreTrainedModel, *, k_major: bool) -> None:
    """Put every module that computes under the contract.

    Args:
        model: a Qwen3 or Llama.
        k_major: lay the weights out for decode, in place: the same values, names and shapes, other strides.

    Raises:
        UnsupportedError: an operation is outside the contract; it is named, and nothing has been changed.
    """
    forwards = contract_forwards(model)
    if k_major:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.weight.data = operations.to_k_major(module.weight.data)
    for module, forward in forwards.items():
        module.forward = forward
    setattr(model, _UNDO, k_major)


def leave(model: PreTrainedModel) -> None:
    """Undo `enter`; the weights are laid out as torch makes them."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
        if type(module) is nn.Linear:
            module.weight.data = module.weight.data.contiguous()
    delattr(model, _UNDO)


def is_entered(model: PreTrainedModel) -> bool:
    """Tell whether the whole model is under the contract."""
    return hasattr(model, _UNDO)


def contract_forwards(model: PreTrainedModel) -> dict[nn.Module, Forward]:
    """Return the forward under the contract of each module that needs one.

    Raises:
        UnsupportedError: a module or a property is outside the contract; its name is in the message.
    """
    forwards: dict[nn.Module, Forward] = {}
    for name, module in model.named_modules():
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        kind, home = type(module).__name__, type(module).__module__
        for own, tensor in module.named_parameters(recurse=False):
            if tensor.dtype != torch.bfloat16:
                _refuse(f"{where}.{own}", tensor.dtype, "bfloat16 weights")
        if type(module) is nn.Linear:
            if module.bias is not None:
                _refuse(where, "a Linear with a bias", "Linear without a bias")
            forwards[module] = _linear(module)
        elif home in _HOMES and kind.endswith("RMSNorm"):
            width = module.weight.shape[0]
            if width % NORM_WIDTH_STEP or width >= NORM_WIDTH_LIMIT:
                _refuse(where, f"width {width}", f"multiples of {NORM_WIDTH_STEP} under {NORM_WIDTH_LIMIT}")
            forwards[module] = _norm(module)
        elif home in _HOMES and kind.endswith("RotaryEmbedding"):
            forwards[module] = _rotary(require_trusted(model))
        elif kind in ("SiLUActivation", "SiLU"):
            forwards[module] = operations.silu
        elif type(module) not in (nn.Embedding, nn.ModuleList) and not (home in _HOMES and kind.endswith(_CONTAINERS)):
            _refuse(where, f"a {kind}", "Qwen3 and Llama with Linear, RMSNorm, RoPE and SiLU")
    return forwards


def _linear(module: nn.Linear) -> Forward:
    return lambda x: operations.linear(x, module.weight)


def _norm(module: Any) -> Forward:
    return lambda x: operations.rms_norm(x, module.weight, module.variance_epsilon)


def _rotary(table: RopeTable) -> Forward:
    positions = table.cos.shape[0]

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if int(position_ids.max()) >= positions:
            raise UnsupportedError(
                f"position {int(position_ids.max())} is beyond the RoPE table's {positions}: the contract covers "
                "0 .. max_position_embeddings - 1"
            )
        return tuple(part[position_ids].repeat(1, 1, 2) for part in (table.cos, table.sin))

    return forward


def _refuse(where: str, given: object, allowed: str) -> None:
    raise UnsupportedError(
        f"{where}: {given} is outside the numeric contract, which covers {allowed}. Take scope 'attention' or producer "
        "'stock'."
    )
