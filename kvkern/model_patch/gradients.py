"""Gradients: kvkern computes none, so one that would flow through its operations is refused, not lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kvkern.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


def would_flow(*inputs: Tensor) -> bool:
    """Tell whether autograd would record an operation on these inputs."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def refuse_gradient(out: Tensor, *inputs: Tensor, what: str, training: bool = False) -> Tensor:
    """Return `out` such that a backward pass through it raises; unchanged where autograd records nothing.

    A forward in eval mode without `torch.no_grad()` stays possible, as with any model that is only read.

    Args:
        out: what kvkern has computed from `inputs`.
        inputs: tensors that a gradient would belong to.
        what: the operation, for the message.
        training: the module is in training mode.

    Raises:
        UnsupportedError: in training mode; in eval mode the backward pass raises it.
    """
    if not would_flow(*inputs):
        return out
    if training:
        raise UnsupportedError(_message(what))
    return _Refusal.apply(out, what, *inputs)


class _Refusal(torch.autograd.Function):
    """The identity of its first input, without a derivative."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, what: str, *inputs: Tensor) -> Tensor:
        ctx.what = what
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UnsupportedError(_message(ctx.what))


def _message(what: str) -> str:
    return (
        f"a gradient would flow through kvkern's {what}, which computes none: call kvkern.unpatch(model) before "
        "training, or model.eval() and torch.no_grad() to read"
    )
