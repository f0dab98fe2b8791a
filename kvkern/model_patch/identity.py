"""The KVSpec of a live model: everything in its weights and configuration that changes KV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvkern.contract import CONTRACT_ID, SILU_TABLE_SHA256
from kvkern.environment import cpu_isa
from kvkern.model_patch.adapters import adapters_of, quantization_of
from kvkern.model_patch.forwards import is_compiled
from kvkern.model_patch.rope import rope_table
from kvkern.model_patch.support import CAUSAL_FIELDS, other_than_full_causal
from kvkern.spec import KVSpec
from kvkern.weights import model_weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of a configuration that cannot change KV. Whatever is not listed here is part of the spec: an unknown field
# may cost a refusal, never a wrong cache.
IRRELEVANT = frozenset(
    """
    _name_or_path _model_name_or_path architectures attention_dropout attn_implementation bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id dtype torch_dtype id2label
    label2id initializer_range is_encoder_decoder output_attentions output_hidden_states pretraining_tp
    problem_type quantization_config return_dict tie_word_embeddings tokenizer_class transformers_version use_cache
    cross_attention_hidden_size tie_encoder_decoder prefix finetuning_task task_specific_params
    num_hidden_layers num_attention_heads num_key_value_heads head_dim model_type
    """.split()  # noqa: SIM905 quoted one by one the names would be harder to read
)


def spec_of(
    model: PreTrainedModel, *, producer: str = "stock", salt: str = "", attn_implementation: str | None = None
) -> KVSpec:
    """Return the spec under which this model publishes and reads.

    The weights digest costs one pass over the weights (SHA-256, in parallel) and is kept until a weight changes.

    Args:
        model: a causal LM with full causal attention.
        producer: `stock`, or `contract`.
        salt: keeps documents of different owners apart.
        attn_implementation: what attended, uncompiled, where that was not the model as it is.

    Returns:
        The spec.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return KVSpec(
        weights=model_weights_digest(model),
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        num_q_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        config=_config_of(model),
        dtype=str(model.dtype).removeprefix("torch."),
        producer=producer,
        producer_info=_stock_info(model, attn_implementation) if producer == "stock" else contract_info(model),
        salt=salt,
    )


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the fields that change KV; adapters and quantisation only where there are any."""
    kept = computing_fields(model.config.get_text_config(), with_causal=other_than_full_causal(model) is not None)
    for name, described in (("adapters", adapters_of(model)), ("quantization", quantization_of(model))):
        if described:
            kept[name] = described
    return kept


def computing_fields(config: Any, *, with_causal: bool = False) -> dict[str, Any]:
    """Return the fields of a configuration that change KV, sorted; those of full causal attention only if asked for."""
    left_out = IRRELEVANT if with_causal else IRRELEVANT | CAUSAL_FIELDS
    fields = _plain(config.to_dict())
    return {
        name: value
        for name, value in sorted(fields.items())
        if name not in left_out
        and (name, value) not in (("add_cross_attention", False), ("chunk_size_feed_forward", 0))
    }


def _stock_info(model: PreTrainedModel, attn_implementation: str | None) -> dict[str, Any]:
    info: dict[str, Any] = {
        "attn_implementation": attn_implementation or str(model.config._attn_implementation),
        "device": cpu_isa() if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
        "torch": str(torch.__version__),
    }
    if attn_implementation is None and any(map(is_compiled, model.modules())):
        info["compiled"] = True
    return info


def contract_info(model: PreTrainedModel) -> dict[str, str]:
    """Return the contract and the tables under which a model computes KV."""
    table = rope_table(model)
    return {"contract": CONTRACT_ID, "rope_table": table.digest, "silu_table": SILU_TABLE_SHA256}


def _plain(value: Any) -> Any:
    """Keep JSON scalars and mappings of them; None and empty values say nothing."""
    if isinstance(value, dict):
        kept = {str(name).replace(".", "_"): _plain(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in (None, {})}
    if isinstance(value, (list, tuple)):
        return {str(i): _plain(item) for i, item in enumerate(value)}
    return value if isinstance(value, (bool, int, float, str)) else None
