"""The RoPE table of a model: made by its own stock rotary embedding, trusted only where that is known to be right."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from kvkern.contract import KNOWN_ROPE_TABLES
from kvkern.errors import UnsupportedError
from kvkern.probe import stock_order
from kvkern.tables import RopeTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIXED = ("default", "linear", "llama3", "yarn")  # the frequencies do not depend on the sequence

_TABLES: weakref.WeakKeyDictionary[Any, RopeTable] = weakref.WeakKeyDictionary()


def rope_table(model: PreTrainedModel) -> RopeTable:
    """Return the table of a model's RoPE over all of its positions.

    Raises:
        UnsupportedError: the kind of RoPE has no fixed table; or this host's torch is not known to make the contract's.
    """
    rotary = _rotary_of(model)
    if rotary not in _TABLES:
        _TABLES[rotary] = _made(rotary, model.config.get_text_config())
    table = _TABLES[rotary]
    if not stock_order().follows and table.digest not in KNOWN_ROPE_TABLES:
        raise UnsupportedError(
            f"{type(model).__name__}: RoPE table {table.digest} was made on this host and is not among the known ones; "
            f"{stock_order().reason}. Take the publisher's: kvkern.patch(model, scope='model', "
            "rope_table=store.rope_table(digest))."
        )
    return table


def _rotary_of(model: PreTrainedModel) -> Any:
    found = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(found)} rotary embeddings: the numeric contract covers models with one. "
            "Take scope 'attention' or producer 'stock'."
        )
    return found[0]


def _made(rotary: Any, config: Any) -> RopeTable:
    kind = getattr(rotary, "rope_type", "default")
    if kind not in _FIXED:
        raise UnsupportedError(
            f"RoPE type {kind!r} is outside the numeric contract, whose table covers {', '.join(_FIXED)}. Take scope "
            "'attention' or producer 'stock'."
        )
    positions = torch.arange(config.max_position_embeddings, device=rotary.inv_freq.device)[None]
    like = torch.empty(0, dtype=torch.bfloat16, device=positions.device)
    halves = []
    for part in type(rotary).forward(rotary, like, positions):
        left, right = part[0].cpu().chunk(2, dim=-1)
        if not torch.equal(left, right):
            raise UnsupportedError(f"{type(rotary).__name__} does not rotate halves: the numeric contract does not cover it")
        halves.append(left.contiguous())
    return RopeTable(*halves)
