"""Attention calls whose outputs are probabilities, chosen so that every known form of eager attention shows in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvkern.attention import prefix_attention
from kvkern.probe import stock_order
from kvkern.view import KVView

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 64
WIDTHS = (17, 37, 61)
"""Columns of the decode calls. None is a multiple of 8: torch's CPU softmax in bf16 differs from the one in fp32 in the
columns after the last whole vector only, because their exponentials come from another routine."""

# Scores of the last two columns of a row, beside a 0 in the first: here the two softmaxes round differently, under
# AVX-512 and AVX2 at every width above (found by trying all pairs of 1,024 bf16 values). Others see it once in 70,000.
_TAIL_SCORES = (
    (-4.84375, -0.06640625), (-2.421875, -0.75390625), (-0.1943359375, -0.060791015625), (-0.1640625, -0.1328125),
    (-0.09326171875, -0.09130859375), (-2.46875, -0.1650390625), (-6.59375, -0.046875), (-0.6796875, -0.038818359375),
)  # fmt: skip
# Softmax does not see an offset; a softcap does where it is large, a sink where it is far below 0.
_OFFSETS = (-96.0, 0.0, 96.0)
_LOWEST = -200.0
_RANDOM_ROWS = 32
_ODD_SCALING = 80**-0.5  # no power of two, so it matters what is multiplied by it
_EXACT, _ROUNDED = 2.0**-6, 2.0**-3

FORMS: dict[str, dict[str, Any]] = {
    "softmax in bfloat16": {"softmax_dtype": None},
    "softmax in bfloat16 of scores less their maximum": {"softmax_dtype": None, "subtract_maximum": True},
    "queries scaled before the product": {"scale_queries": True},
    "scores kept in float32": {"float_scores": True},
    "probabilities not rounded to bfloat16": {"round_probabilities": False},
    "a softmax that is not causal": {"causal": False},
}
"""Other forms than stock's, as arguments of `plain_form`."""


@dataclass(frozen=True)
class Witness:
    """One call of attention.

    Attributes:
        q: `[B, num_q_heads, M, HEAD_DIM]` bf16.
        k: `[B, num_kv_heads, C, HEAD_DIM]` bf16, one-hot.
        v: the same shape; one-hot, so that channel j is the probability of key j. The channels after C add two of them.
        mask: `[B, 1, M, C]` bf16, 0 or the lowest value, as transformers makes it for eager.
        scaling: of the scores; None for the function's own default.
        tolerance: relative difference that rounding in another place can make.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    scaling: float | None
    tolerance: float


def witnesses(num_q_heads: int, num_kv_heads: int, device: torch.device) -> list[Witness]:
    """Make the calls: decode at each width with scores that are exact in bf16, prefill with scores that are rounded.

    The decode calls show how probabilities are made from scores, the prefill call how scores are made, and the mask.
    The last one leaves the scaling to the function.
    """
    with torch.device("cpu"):  # whatever the default device is: the same numbers everywhere
        calls = _calls(num_q_heads, num_kv_heads)
    return [
        Witness(*(x.to(device, torch.bfloat16) for x in (c.q, c.k, c.v, c.mask)), c.scaling, c.tolerance) for c in calls
    ]


def _calls(num_q_heads: int, num_kv_heads: int) -> list[Witness]:
    generator = torch.Generator().manual_seed(0)
    calls = []
    for width in WIDTHS:
        rows = _decode_rows(width, generator)
        batch = -(-len(rows) // num_q_heads)
        rows = rows.repeat(num_q_heads + 1, 1)[: batch * num_q_heads]
        q = _rolled(rows.view(batch, num_q_heads, 1, HEAD_DIM), num_kv_heads)
        calls.append(_call(q, num_kv_heads, width, 2.0, 0.5, _EXACT))
    q = torch.randn(1, num_q_heads, 16, HEAD_DIM, generator=generator) * 16
    for scaling in (_ODD_SCALING, None):
        calls.append(_call(q, num_kv_heads, WIDTHS[1], 1.4140625, scaling, _ROUNDED))
    return calls


def _decode_rows(width: int, generator: torch.Generator) -> Tensor:
    """Return `[n, HEAD_DIM]` scores, of which the first `width` count."""
    rows = torch.full((len(_TAIL_SCORES) + len(_OFFSETS), HEAD_DIM), _LOWEST)
    rows[: len(_TAIL_SCORES), 0] = 0.0
    rows[: len(_TAIL_SCORES), width - 1] = torch.tensor([scores[0] for scores in _TAIL_SCORES])
    rows[: len(_TAIL_SCORES), width - 2] = torch.tensor([scores[1] for scores in _TAIL_SCORES])
    steps = torch.arange(HEAD_DIM) % 5
    for row, offset in zip(rows[len(_TAIL_SCORES) :], _OFFSETS, strict=True):
        row[:] = offset - steps
    return torch.cat([rows, torch.randn(_RANDOM_ROWS, HEAD_DIM, generator=generator) * 2])


def _rolled(q: Tensor, num_kv_heads: int) -> Tensor:
    """Shift each query head as far as the keys of its KV head are shifted, so that a wrong head shows."""
    groups = q.shape[1] // num_kv_heads
    return torch.stack([q[:, head].roll(head // groups, -1) for head in range(q.shape[1])], 1)


def _call(q: Tensor, num_kv_heads: int, width: int, key: float, scaling: float | None, tolerance: float) -> Witness:
    batch, _, rows, _ = q.shape
    one_hot = torch.eye(HEAD_DIM)
    channels = one_hot[:width].clone()
    for i in range(min(HEAD_DIM - width, width - 1)):
        channels[i : i + 2, width + i] = 1.0
    k = torch.stack([one_hot.roll(head, 1)[:width] * key for head in range(num_kv_heads)])
    v = torch.stack([channels * (1 + head % 2) for head in range(num_kv_heads)])
    lowest = torch.full((rows, width), torch.finfo(torch.bfloat16).min)
    shape = (batch, num_kv_heads, width, HEAD_DIM)
    mask = lowest.triu(width - rows + 1).expand(batch, 1, rows, width)
    return Witness(q, k.expand(shape), v.expand(shape), mask, scaling, tolerance)


def stock_output(call: Witness) -> Tensor:
    """Return what stock eager has here, `[B, M, num_q_heads, HEAD_DIM]` bf16.

    That is C's output on a CPU whose torch adds in the contract's order. Elsewhere it is that of stock's form in plain
    torch operations on the same device, so that only the form is judged and never the host.
    """
    if call.q.device.type == "cpu" and stock_order().follows:
        kv = KVView.from_dense(call.k, call.v, query_len=call.q.shape[2])
        return prefix_attention(call.q, kv, sm_scale=call.scaling, backend="c")
    return plain_form(call)


def plain_form(
    call: Witness,
    *,
    softmax_dtype: torch.dtype | None = torch.float32,
    scale_queries: bool = False,
    float_scores: bool = False,
    round_probabilities: bool = True,
    subtract_maximum: bool = False,
    causal: bool = True,
) -> Tensor:
    """Attend in plain torch operations; without arguments in stock's form."""
    q, groups = call.q, call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (call.k, call.v))
    scaling = HEAD_DIM**-0.5 if call.scaling is None else call.scaling
    if float_scores:
        q, k = q.float(), k.float()
    scores = (q * scaling) @ k.mT if scale_queries else q @ k.mT * scaling
    if causal:
        scores = scores + call.mask
    if subtract_maximum:
        scores = scores - scores.amax(dim=-1, keepdim=True)
    p = torch.softmax(scores, dim=-1, dtype=softmax_dtype)
    out = p.to(v.dtype) @ v if round_probabilities else (p @ v.float()).to(v.dtype)
    return out.transpose(1, 2).contiguous()


def known_form(outputs: list[Tensor], calls: list[Witness]) -> str | None:
    """Name the form whose bits these outputs are, among those of `FORMS`."""
    for name, arguments in FORMS.items():
        if all(differing(plain_form(c, **arguments), out).sum() == 0 for out, c in zip(outputs, calls, strict=True)):
            return name
    return None


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Return which elements differ in their bits."""
    return a.contiguous().view(torch.int16) != b.contiguous().view(torch.int16)
