"""The attention function that transformers calls: over a PrefixCache in place, over any other cache by packing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvkern.attention import launch, new_workspace, prefix_attention
from kvkern.contract import KEY_RUN, KEY_RUN_LONG
from kvkern.errors import KvkernError, UnsupportedError
from kvkern.kernels import native
from kvkern.model_patch.cache import HANDLE_ATTRIBUTE, LayerHandle
from kvkern.model_patch.calls import HARMLESS
from kvkern.model_patch.gradients import refuse_gradient
from kvkern.view import KVView

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.attention import KeyRun, Profile


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    key_run: KeyRun = "stock",
    profile: Profile = "exact",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend. Signature of transformers' attention interface.

    Args:
        module: the attention module that calls.
        query: `[B, num_q_heads, Tq, head_dim]` bf16, after RoPE.
        key: what the cache layer's `update` returned; a PrefixCache hands itself over on it.
        value: likewise.
        attention_mask: what `masks.padding_mask` returned.
        scaling: factor of the scores.
        dropout: must be 0.
        key_run: keys of one output chain.
        profile: `exact` or `fast`.
        kwargs: whatever else the model passes; anything that would change the result is refused.

    Returns:
        `([B, Tq, num_q_heads, head_dim] bf16, None)`.

    Raises:
        UnsupportedError: naming what kvkern does not compute; a gradient, in the backward pass.
    """
    _refuse(module, query, attention_mask, dropout, kwargs)
    handle: LayerHandle | None = getattr(key, HANDLE_ATTRIBUTE, None)
    if handle is None:
        out = _attend_plain(query, key, value, attention_mask, scaling, key_run, profile)
        return refuse_gradient(out, query, key, value, what="attention", training=module.training), None
    if getattr(value, HANDLE_ATTRIBUTE, None) is not handle:
        raise UnsupportedError(
            f"{type(module).__name__} changes its values after the cache: kvkern reads them from the published blocks"
        )
    batch, heads, rows, head_dim = query.shape
    out = query.new_empty(batch, rows, heads, head_dim)
    kv = handle.view(module, attention_mask, kwargs.get("position_ids"))
    q = native.dense_rows(query)
    workspace = _workspace(handle, q, kv, profile)
    launch(q, kv, out, None, sm_scale=scaling, key_run=key_run, profile=profile, workspace=workspace)
    return refuse_gradient(out, query, *handle.recorded, what="attention", training=module.training), None


contract_attention_forward = partial(attention_forward, key_run=KEY_RUN)
"""Attend under the contract, whatever the chunks: what scope "model" registers."""
fast_attention_forward = partial(attention_forward, profile="fast")
"""Attend on tensor cores: what profile "fast" registers."""
long_run_attention_forward = partial(attention_forward, key_run=KEY_RUN_LONG)
"""Attend as stock does in a prefill of more than 1,024 tokens, over any number of keys."""


def _workspace(handle: LayerHandle, q: Tensor, kv: KVView, profile: Profile) -> Tensor:
    """Return the cache's work space: one for all layers and steps of equal shapes, which run one after the other."""
    shapes = (profile, q.shape, kv.block_table.shape, kv.block_tiles, kv.suffix_k.shape)
    if handle.cache.workspace is None or handle.cache.workspace[0] != shapes:
        handle.cache.workspace = None  # the old one's memory is free for the new one
        handle.cache.workspace = (shapes, new_workspace(q, kv, profile=profile))
    return handle.cache.workspace[1]


def _attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    key_run: KeyRun,
    profile: Profile,
) -> Tensor:
    """Attend over a cache of plain tensors; each row is packed without its padding and has the bits of a lone row."""
    if k.device.type == "meta":
        raise KvkernError(
            "a PrefixCache met a model that does not hand its keys on unchanged: this architecture is not supported"
        )
    if v.shape != k.shape:
        raise UnsupportedError(
            f"value head_dim {v.shape[-1]} differs from the key's {k.shape[-1]}: kvkern needs them equal"
        )
    rows, columns = q.shape[2], k.shape[2]
    if mask is None:
        kv = KVView.from_dense(k, v, query_len=min(rows, columns))
        return prefix_attention(q, kv, sm_scale=scaling, key_run=key_run, profile=profile)
    lens = mask.sum(1, dtype=torch.int32)
    query_len = mask[:, columns - rows :].sum(1, dtype=torch.int32)
    is_suffix = mask[:, 1:] >= mask[:, :-1]
    if not bool(is_suffix.all()):  # padding between or after the tokens: bring each row's tokens to its end
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        k, v = (x.gather(2, order.expand_as(x)) for x in (k, v))
        _require_trailing_queries(mask[:, columns - rows :])
    kv = KVView.from_dense(k, v, lens=lens, query_len=query_len)
    return prefix_attention(q, kv, sm_scale=scaling, key_run=key_run, profile=profile)


def _require_trailing_queries(query_mask: Tensor) -> None:
    if not bool((query_mask[:, 1:] >= query_mask[:, :-1]).all()):
        raise UnsupportedError("padding after a row's tokens: pad on the left (tokenizer.padding_side = 'left')")


def _refuse(
    module: torch.nn.Module,
    query: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    if query.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"attention in {query.dtype}: kvkern is exact in bfloat16, load the model with dtype=torch.bfloat16"
        )
    if dropout:
        raise UnsupportedError(f"attention dropout {dropout}: kvkern computes inference only, call model.eval()")
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError(
            f"a {mask.dim()}D attention mask: kvkern takes causal attention with a 2D padding mask only"
        )
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedError(f"{type(module).__name__} is not causal: kvkern computes causal attention only")
    for name, given in kwargs.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise UnsupportedError(f"{name}={given!r} in attention: kvkern does not compute it")
