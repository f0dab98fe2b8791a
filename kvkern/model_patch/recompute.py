"""Is a served prefix what this model computes? Both of its ends are computed again and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvkern.contract import KEY_RUN, TILE_TOKENS, stock_key_run
from kvkern.environment import cpu_isa
from kvkern.errors import KVMismatchError, UnsupportedError
from kvkern.model_patch.adapters import adapted_module, base_model, quantization_of
from kvkern.model_patch.as_configured import rope_of_a_prompt
from kvkern.model_patch.attending import attending_by
from kvkern.model_patch.computing import PARITY_TOKENS, prefill, require_known_attention
from kvkern.model_patch.eager_form import check_form
from kvkern.model_patch.register import (
    CONTRACT_IMPLEMENTATION,
    IMPLEMENTATION,
    LONG_RUN_IMPLEMENTATION,
    register,
    under_contract,
)
from kvkern.probe import stock_order

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern.model_patch.store import Prefix
    from kvkern.spec import KVSpec

END_TOKENS = 64
"""Tokens of each end of the prefix that are computed again."""
LEAST_DISTANCE = 2.0**-8
"""Relative distance that bf16 itself explains, whatever a model shows between eager and sdpa."""
_BITS_OF = ("eager", "kvkern")
_AMX = "amx_bf16"

KV = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class Recomputed:
    """What the recomputation of a prefix's ends has found: no difference, by this rule.

    Attributes:
        rule: `bits`: every recomputed element has the stored bits. `distance`: in every layer K and V are as near to
            the recomputed ones as eager and sdpa are to each other, within a factor of two.
        reason: why this rule ran, in words.
        tokens: how many tokens were computed again, from both ends.
        distance: the largest relative distance of a layer's K or V, and
        limit: what was allowed there; both 0 under the rule `bits`.
    """

    rule: str
    reason: str
    tokens: int
    distance: float = 0.0
    limit: float = 0.0


def recompute(prefix: Prefix, model: PreTrainedModel) -> Recomputed:
    """Compute the first and the last 64 tokens of a prefix again and compare them with what is served.

    The last ones are read in one chunk over the stored KV before them.

    Args:
        prefix: opened for `model`; the tokens that it serves count, its document may be longer.
        model: patched or not; it is left alone.

    Raises:
        KVMismatchError: the stored KV is not what this model computes; layer and size of the difference are named.
        UnsupportedError: a `contract` document, and the model is outside the contract on this host.

    Bits:
        Under the rule `bits` nothing may differ. It finds mistakes and not forgers: only both ends are read.
    """
    _require_vocabulary(prefix, model)
    register()
    for name in ("eager", "sdpa", IMPLEMENTATION, CONTRACT_IMPLEMENTATION, LONG_RUN_IMPLEMENTATION):
        require_known_attention(name)
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        return _by_rule(prefix, model)


def _by_rule(prefix: Prefix, model: PreTrainedModel) -> Recomputed:
    if prefix.spec.producer == "contract":
        with under_contract(model):
            return _compare_bits(prefix, model, KEY_RUN, "producer 'contract' fixes every bit")
    obstacle = bit_rule_obstacle(prefix.spec, model)
    if obstacle is not None:
        return compare_distances(prefix, model, obstacle)
    reason = "computed by eager's arithmetic on a host like this one"
    try:
        return _compare_stock_bits(prefix, model, reason)
    except UnsupportedError as error:  # such as a model that changes its values after the cache
        return compare_distances(prefix, model, str(error))
    except KVMismatchError as difference:
        if prefix.spec.producer_info["device"] != _AMX:
            raise
        # oneDNN adds in another order under AMX than under AVX512_BF16, and the document does not say which it took.
        return compare_distances(prefix, model, f"on a CPU with AMX oneDNN has two orders of sums; {difference}")


def bit_rule_obstacle(spec: KVSpec, model: PreTrainedModel) -> str | None:
    """Say why a document of producer `stock` cannot be expected to have this host's bits; None when it can."""
    info = spec.producer_info
    attention = info.get("attn_implementation")
    if attention not in _BITS_OF:
        return f"the document was computed by {attention!r}"
    if attention == "eager" and (form := _other_form(model)) is not None:
        return f"the model's own eager attention is not stock eager: {form}"
    if info.get("compiled"):
        return "the document was computed by a compiled model"
    for name, here in (("device", cpu_isa()), ("torch", str(torch.__version__))):
        if info.get(name) != here:
            return f"the document was computed with {name} {info.get(name)!r}, here it is {here!r}"
    if {parameter.device.type for parameter in model.parameters()} != {"cpu"}:
        return "the model is not on the CPU"
    if quantization_of(model):
        return "the model is quantised: a token's bits depend on its company"
    if (reason := _not_dense(base_model(model))) is not None:
        return reason
    return None if stock_order().follows else stock_order().reason


def compare_distances(prefix: Prefix, model: PreTrainedModel, reason: str = "asked for") -> Recomputed:
    """Compare both ends by relative distance, layer by layer, K and V apart, without token 0.

    The yardstick is what this very model shows between its own eager and sdpa attention on these tokens.

    Raises:
        KVMismatchError: a layer is further away than twice that, and than twice 2^-8.
    """
    worst = (0.0, 2 * LEAST_DISTANCE)
    for first, count in _ends(prefix.tokens):
        served = prefix.document.kv(first, count)
        eager = _recomputed(prefix, _reader(prefix, model, "eager"), first, count)
        sdpa = eager
        if getattr(base_model(model), "_supports_sdpa", False):
            sdpa = _recomputed(prefix, _reader(prefix, model, "sdpa"), first, count)
        skip = 1 if first == 0 and count > 1 else 0
        for part, mine, own, other in zip("KV", served, eager, sdpa, strict=True):
            distances = _distances(mine[:, :, skip:], own[:, :, skip:])
            limits = 2 * _distances(other[:, :, skip:], own[:, :, skip:]).clamp_min(LEAST_DISTANCE)
            layer = int((distances / limits).argmax())
            distance, limit = float(distances[layer]), float(limits[layer])
            if not distance <= limit:
                raise KVMismatchError(
                    f"document {prefix.digest}: {part} of layer {layer}, tokens {first + skip} to {first + count - 1}, "
                    f"is at a relative distance of {distance:.4f} from what this model computes, {limit:.4f} is "
                    f"allowed ({reason}). Do not use the document with this model; publish it again"
                )
            worst = max(worst, (distance, limit), key=lambda pair: pair[0] / pair[1])
    return Recomputed("distance", reason, _end_tokens(prefix.tokens), *worst)


def _compare_stock_bits(prefix: Prefix, model: PreTrainedModel, reason: str) -> Recomputed:
    """Compare under the run rule of the document's own prefill, whatever part of it is served."""
    register()
    tokens = prefix.document.manifest.num_tokens
    if tokens <= PARITY_TOKENS:  # a whole prefill again, as it was: short calls of stock have orders of their own
        own = attending_by(model, prefix.spec.producer_info["attn_implementation"])
        k, v = prefill(own, prefix.document.token_ids()[None])
        _require_bits(prefix, 0, (k[:, :, : prefix.tokens], v[:, :, : prefix.tokens]))
        return Recomputed("bits", reason, prefix.tokens)
    run = stock_key_run(tokens, tokens)
    name = CONTRACT_IMPLEMENTATION if run == KEY_RUN else LONG_RUN_IMPLEMENTATION
    return _compare_bits(prefix, _reader(prefix, model, name), run, reason)


def _reader(prefix: Prefix, model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return a model that attends so and rotates by the frequencies of the document's own prefill, whatever it reads.

    Dynamic RoPE and longrope choose them by the longest position of a forward.
    """
    twin = attending_by(model, implementation)
    for module in twin.modules():
        frequencies = rope_of_a_prompt(module, prefix.document.manifest.num_tokens)
        if frequencies is not None:
            module._buffers["inv_freq"] = frequencies.to(module.inv_freq.device)
            module.rope_type = "default"  # a forward leaves them alone
    return twin


def _compare_bits(prefix: Prefix, model: PreTrainedModel, run: int, reason: str) -> Recomputed:
    for first, count in _ends(prefix.tokens):
        own = _over_tiles(prefix, model, first, count) if first else _first_tokens(prefix, model, count)
        _require_bits(prefix, first, own)
    return Recomputed("bits", f"{reason}, runs of {run} keys", _end_tokens(prefix.tokens))


def _require_bits(prefix: Prefix, first: int, own: KV) -> None:
    served = prefix.document.kv(first, own[0].shape[2])
    for part, mine, computed in zip("KV", served, own, strict=True):
        differ = mine.view(torch.int16) != computed.contiguous().view(torch.int16)
        if bool(differ.any()):
            layer, head, token, channel = differ.nonzero()[0].tolist()
            raise KVMismatchError(
                f"document {prefix.digest}: {int(differ.sum()):,} of {differ.numel():,} elements of {part} differ from "
                f"what this model computes for tokens {first} to {first + own[0].shape[2] - 1}, first in layer {layer} "
                f"at token {first + token}, head {head}, channel {channel}. Do not use the document with this model; "
                "publish it again"
            )


def _ends(tokens: int) -> list[tuple[int, int]]:
    """Return (first token, count) of both ends."""
    head = (0, min(tokens, END_TOKENS))
    return [head] if tokens <= END_TOKENS else [head, (tokens - END_TOKENS, END_TOKENS)]


def _end_tokens(tokens: int) -> int:
    return min(tokens, 2 * END_TOKENS)


def _first_tokens(prefix: Prefix, model: PreTrainedModel, count: int) -> KV:
    """Prefill the first tokens; a single one twice, since stock adds otherwise in a Linear of one row."""
    ids = prefix.token_ids[None, :count]
    return prefill(model, ids.repeat(2, 1) if count == 1 else ids)


def _over_tiles(prefix: Prefix, model: PreTrainedModel, first: int, count: int) -> KV:
    """Read some tokens in one chunk over the attached prefix before them."""
    before = type(prefix)(prefix.document, model, first)
    inputs = before.prepare(prefix.token_ids[first : first + count])
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    start = first % TILE_TOKENS
    layers = inputs["past_key_values"].layers
    k = torch.stack([layer.suffix_k[0].mT.flatten(1, 2)[:, start : start + count] for layer in layers])
    v = torch.stack([layer.suffix_v[0].flatten(1, 2)[:, start : start + count] for layer in layers])
    return k.cpu(), v.cpu()


def _recomputed(prefix: Prefix, model: PreTrainedModel, first: int, count: int) -> KV:
    """Read some tokens in one chunk over transformers' own cache of the stored KV before them."""
    from transformers import DynamicCache

    if first == 0:
        return _first_tokens(prefix, model, count)
    cache = DynamicCache(config=model.config)
    k, v = (part.to(model.device) for part in prefix.document.kv(0, first))
    for layer in range(prefix.spec.num_layers):
        cache.update(k[layer][None], v[layer][None], layer)
    ids = prefix.token_ids[None, first : first + count].to(model.device)
    with torch.inference_mode():
        model(
            input_ids=ids,
            attention_mask=ids.new_ones(1, first + count),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return tuple(
        torch.cat([getattr(x, name)[..., first:, :] for x in cache.layers]).cpu() for name in ("keys", "values")
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Relative Frobenius distance of each layer, `[layers]` fp64."""
    a, b = (x.double().flatten(1) for x in (a, b))
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


def _other_form(model: PreTrainedModel) -> str | None:
    try:
        form = check_form(model)
    except UnsupportedError as error:
        return str(error)
    return None if form.equal else form.reason


def _not_dense(model: PreTrainedModel) -> str | None:
    """Say why a token's bits may depend on the other tokens of its forward, attention aside."""
    from transformers.pytorch_utils import Conv1D

    experts = {name: n for name, n in vars(model.config.get_text_config()).items() if "expert" in name}
    if any(type(n) is int and n > 1 for n in experts.values()):
        return "the model is a mixture of experts: a token's bits depend on its company"
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if any(parameter.dtype != torch.bfloat16 for parameter in own):
            return f"{name} computes in another dtype than bfloat16"
        is_known = isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or all(p.dim() == 1 for p in own)
        if not is_known:
            return f"{name} is a {type(module).__name__}, of which a token's bits may depend on its company"
    return None


def _require_vocabulary(prefix: Prefix, model: PreTrainedModel) -> None:
    ids, vocabulary = prefix.token_ids, adapted_module(model.get_input_embeddings()).weight.shape[0]
    if int(ids.max()) >= vocabulary:
        token = int((ids >= vocabulary).nonzero()[0])
        raise KVMismatchError(
            f"document {prefix.digest}: {int(ids[token])} at token {token} is beyond the model's vocabulary of "
            f"{vocabulary}: this model cannot have computed it"
        )
