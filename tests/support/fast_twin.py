"""The fast kernel's arithmetic in torch, and variants that round elsewhere: quick enough to read many documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvkern.contract import TILE_TOKENS
from kvkern.kernels.fast_door import LOG2E

LEAF, MOST = 256, 1024
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """What is rounded to bf16 on the way.

    Attributes:
        scores: the product of q and k, and again once it is scaled, as stock eager does; the fast kernel does not.
        p: the weights of V; the fast kernel does, before they are normalised.
    """

    scores: bool = False
    p: bool = True


TWINS = {
    "fast": Rounding(),
    "fast-scores": Rounding(scores=True),
    "fast-scores-p32": Rounding(scores=True, p=False),
    "fast-p32": Rounding(p=False),
}
RESUMMED = "eager-resummed"


def twin(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_len: int, rounding: Rounding) -> torch.Tensor:
    """Attend as the fast kernel does: `[B, Hq, Tq, D]` and `[B, Hkv, T, D]` to `[B, Tq, Hq, D]`, the queries last.

    Sums within a product are torch's own in fp32; everything else is the kernel's, step by step.
    """
    columns = k.shape[2]
    assert columns <= MOST, "more keys make a tree of more than one level"
    scores, scale = _scores(q, k, rounding.scores)
    scores = scores * (LOG2E if rounding.scores else scale * LOG2E)
    v, empty = v.float(), _empty(scores, v)
    total, shared = empty, prefix_len // TILE_TOKENS * TILE_TOKENS
    for begin, end in ((0, shared), (shared, columns)):
        part = empty
        for first, last in _leaves(begin, end):
            state = empty
            for at in range(first, last, TILE_TOKENS):
                keys = slice(at, min(at + TILE_TOKENS, last))
                state = _add_tile(state, scores[..., keys], v[:, :, keys], rounding.p)
            part = _fold(part, state)
        total = _fold(total, part)
    _, weight, acc = total
    return _by_query((acc * (1 / weight)).bfloat16(), q)


def resummed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with all of eager's roundings, and with the sums of fp32 products in another order than eager's."""
    scores, _ = _scores(q, k, rounded=True)
    return _by_query((scores.softmax(-1).bfloat16().float() @ v.float()).bfloat16(), q)


def _scores(q: torch.Tensor, k: torch.Tensor, rounded: bool) -> tuple[torch.Tensor, float]:
    """Return scores `[B, Hkv, group * Tq, T]`, scaled where they are rounded, -inf where hidden; and the scale."""
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    scores = q.reshape(batch, kv_heads, heads // kv_heads * rows, width).float() @ k.float().mT
    if rounded:
        scores = (scores.bfloat16() * width**-0.5).float()
    if rows > 1:
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden.repeat(heads // kv_heads, 1), -math.inf)
    return scores, width**-0.5


def _by_query(out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return out.reshape(q.shape).transpose(1, 2).contiguous()


def _leaves(begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin < end:
        last = min(end, begin // LEAF * LEAF + LEAF)
        yield begin, last
        begin = last


def _empty(scores: torch.Tensor, v: torch.Tensor) -> State:
    m = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    return m, torch.zeros_like(m), scores.new_zeros(*scores.shape[:-1], v.shape[-1])


def _finite(m: torch.Tensor) -> torch.Tensor:
    return m.masked_fill(m == -math.inf, 0)


def _fold(one: State, other: State) -> State:
    m = torch.maximum(one[0], other[0])
    a, b = torch.exp2(one[0] - _finite(m)), torch.exp2(other[0] - _finite(m))
    return m, one[1] * a + other[1] * b, one[2] * a + other[2] * b


def _add_tile(state: State, scores: torch.Tensor, v: torch.Tensor, rounded: bool) -> State:
    m = torch.maximum(state[0], scores.amax(-1, keepdim=True))
    decay, p = torch.exp2(state[0] - _finite(m)), torch.exp2(scores - _finite(m))
    weights = p.bfloat16().float() if rounded else p
    return m, state[1] * decay + p.sum(-1, keepdim=True), weights @ v + state[2] * decay
