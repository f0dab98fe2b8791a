"""Audit: is a document's KV what its model computes from its tokens? Recompute under the contract, and compare."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvkern.contract import TILE_TOKENS
from kvkern.errors import IntegrityError, LayoutError, SpecMismatchError
from kvkern.layout import BLOCK_TILES, BLOCK_TOKENS, pack
from kvkern.layout.shard import encode_shard
from kvkern.model_patch.as_configured import require_as_configured
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.register import under_contract
from kvkern.model_patch.store import Prefix, difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Difference:
    """Where stored and recomputed KV differ first, in a block or at a token.

    Attributes:
        token: position in the document.
        layer: the layer.
        head: the KV head.
        part: `k` or `v`.
        channel: the channel.
        ulps: bf16 steps between the two values; -1 if one is no number.
        elements: how many elements of the block, or of the token, differ.
    """

    token: int
    layer: int
    head: int
    part: str
    channel: int
    ulps: int
    elements: int


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        ok: no difference was found; None unless the document's producer is `contract`, because no other promises bits:
            then this is a report and no verdict.
        is_verdict: every token was recomputed from the tokens alone; else a spot check.
        tokens: tokens of the document.
        checked: tokens that were compared.
        elements: elements of K and V that were compared.
        differing: how many of them differ.
        differences: the first of each block (verdict) or token (spot check) that differs, by position.
    """

    ok: bool | None
    is_verdict: bool
    tokens: int
    checked: int
    elements: int
    differing: int
    differences: tuple[Difference, ...]

    def miss_probability(self, inconsistent: int = 1) -> float:
        """Return how likely a check of this many random tokens misses a document with `inconsistent` bad tokens.

        A forger who changes one token and honestly recomputes all that follows leaves exactly one.
        """
        if inconsistent > self.tokens - self.checked:
            return 0.0
        return math.prod(1 - inconsistent / (self.tokens - i) for i in range(self.checked))


def audit(
    prefix: Prefix,
    model: PreTrainedModel,
    tokens: int | None = None,
    *,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Recompute a document under the numeric contract and compare it with what is stored.

    Args:
        prefix: the document, opened for `model`; all of its tokens are audited.
        model: a Qwen3 or Llama in bf16, patched or not; it is left as it was.
        tokens: None: the verdict, one prefill of the document's tokens, every block's digest compared. N: a spot
            check of N random tokens, each by one decode step over the stored KV of those before it.
        seed: of the choice of tokens; fresh randomness when None, which is what an auditor wants.
        progress: called with `(done, total)` tokens.

    Returns:
        The findings; `ok` is the answer.

    Raises:
        LayoutError: `tokens` is not from 1 to the document's length.
        SpecMismatchError: the model is another than the document names; or its tables are: see `Store.rope_table`.
        IntegrityError: a token is beyond the model's vocabulary.
        UnsupportedError: an operation of the model is outside the contract, or nothing names it; it is named.

    Bits:
        A verdict does not depend on the machine, on threads or on chunks: the contract fixes every operation.
    """
    count = prefix.document.manifest.num_tokens
    if tokens is not None and not 1 <= tokens <= count:
        raise LayoutError(f"tokens is {tokens}; it must be from 1 to the document's {count}, or None for all")
    _require_same_model(prefix, model)
    with under_contract(model), torch.inference_mode():
        if tokens is None:
            found = _all_blocks(prefix, model, progress)
        else:
            chance = random.SystemRandom() if seed is None else random.Random(seed)
            chosen = sorted(chance.sample(range(count), tokens))
            found = _some_tokens(prefix, model, chosen, progress)
    spec = prefix.spec
    checked = count if tokens is None else tokens
    return Audit(
        ok=not found if spec.producer == "contract" else None,
        is_verdict=tokens is None,
        tokens=count,
        checked=checked,
        elements=2 * checked * spec.num_layers * spec.num_kv_heads * spec.head_dim,
        differing=sum(difference.elements for difference in found),
        differences=tuple(found),
    )


def _require_same_model(prefix: Prefix, model: PreTrainedModel) -> None:
    found = difference(prefix.spec, model, None, prefix.spec.salt, contract=True)
    if found is not None:
        raise SpecMismatchError(*found)
    require_as_configured(model)
    ids, vocabulary = prefix.document.token_ids(), model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= vocabulary:
        token = int((ids >= vocabulary).nonzero()[0])
        raise IntegrityError(
            f"document {prefix.digest}: tokens: {int(ids[token])} at token {token} is beyond the model's vocabulary of "
            f"{vocabulary}: this model cannot have computed it. Do not use the document."
        )


def _all_blocks(prefix: Prefix, model: PreTrainedModel, progress: Progress | None) -> list[Difference]:
    ids = prefix.document.token_ids()
    k, v = prefill(model, ids[None])
    k_tiles, v_tiles = pack(k, v)
    found = []
    for i, shard in enumerate(prefix.document.shards):
        tiles = slice(BLOCK_TILES * i, BLOCK_TILES * (i + 1))
        first = BLOCK_TOKENS * i
        own = k_tiles[tiles], v_tiles[tiles]
        data = encode_shard(prefix.spec, first, ids[first : first + BLOCK_TOKENS], *own)
        if hashlib.sha256(data).hexdigest() != shard.block_id:
            # [tiles, layers, heads, head_dim, 64] and [..., 64, head_dim], by token, layer, head, channel
            pairs = {
                "k": (shard.k.permute(0, 4, 1, 2, 3).flatten(0, 1), own[0].permute(0, 4, 1, 2, 3).flatten(0, 1)),
                "v": (shard.v.permute(0, 3, 1, 2, 4).flatten(0, 1), own[1].permute(0, 3, 1, 2, 4).flatten(0, 1)),
            }
            found += _first_difference(first, pairs)
        if progress is not None:
            progress(min(first + BLOCK_TOKENS, len(ids)), len(ids))
    return found


def _some_tokens(
    prefix: Prefix, model: PreTrainedModel, chosen: list[int], progress: Progress | None
) -> list[Difference]:
    ids = prefix.document.token_ids()
    found = []
    for done, token in enumerate(chosen, 1):
        tile, slot = divmod(token, TILE_TOKENS)
        shard = prefix.document.shards[tile // BLOCK_TILES]
        stored = shard.k[tile % BLOCK_TILES, ..., slot], shard.v[tile % BLOCK_TILES, :, :, slot]
        own = _decoded(prefix, model, ids, token)
        pairs = {name: (a[None], b[None]) for name, a, b in zip("kv", stored, own, strict=True)}
        found += _first_difference(token, pairs)
        if progress is not None:
            progress(done, len(chosen))
    return found


def _decoded(prefix: Prefix, model: PreTrainedModel, ids: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Compute K and V `[layers, heads, head_dim]` of one token from the stored KV of those before it."""
    if token == 0:
        return tuple(x[:, :, 0] for x in prefill(model, ids[None, :1]))
    inputs = Prefix(prefix.document, model, token).prepare(ids[token : token + 1])
    model(**inputs, logits_to_keep=1)
    slot, layers = token % TILE_TOKENS, inputs["past_key_values"].layers
    return (
        torch.stack([layer.suffix_k[0, :, 0, :, slot] for layer in layers]),
        torch.stack([layer.suffix_v[0, :, 0, slot] for layer in layers]),
    )


def _first_difference(first: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> list[Difference]:
    """Compare `[tokens, layers, heads, head_dim]` stored and own; at most one difference, counting all."""
    unequal = {name: a.view(torch.int16) != b.view(torch.int16) for name, (a, b) in pairs.items()}
    elements = sum(int(mask.sum()) for mask in unequal.values())
    places = [(*mask.nonzero()[0].tolist(), name) for name, mask in unequal.items() if mask.any()]
    if not places:
        return []
    token, layer, head, channel, part = min(places, key=lambda place: (*place[:3], place[4], place[3]))
    a, b = (_ordered(x[token, layer, head, channel]) for x in pairs[part])
    ulps = -1 if a is None or b is None else abs(a - b)
    return [Difference(first + token, layer, head, part, channel, ulps, elements)]


def _ordered(value: Tensor) -> int | None:
    """Number bf16 values in their order, neighbours one apart; None for no number."""
    bits = int(value.view(torch.int16)) & 0xFFFF
    magnitude = bits & 0x7FFF
    if magnitude > 0x7F80:
        return None
    return -magnitude if bits >> 15 else magnitude
