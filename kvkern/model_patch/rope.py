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
_GIVEN: weakref.WeakSet[RopeTable] = weakref.WeakSet()


def rope_table(model: PreTrainedModel) -> RopeTable:
    """Return the table of a model's RoPE over all of its positions: the one it was given, else made on this host.

    Raises:
        UnsupportedError: the kind of RoPE has no fixed table.
    """
    rotary = _rotary_of(model)
    if rotary not in _TABLES:
        _TABLES[rotary] = _made(rotary, model.config.get_text_config())
    return _TABLES[rotary]


def give_rope_table(model: PreTrainedModel, table: RopeTable) -> None:
    """Make a model use a publisher's table; `Store.open` compares its digest with the document's.

    Raises:
        UnsupportedError: it is not a table of this model's positions and head_dim.
    """
    rotary = _rotary_of(model)
    made = _made(rotary, model.config.get_text_config())
    if table.cos.shape != made.cos.shape:
        raise UnsupportedError(
            f"rope_table has {tuple(table.cos.shape)} positions and channels, {type(model).__name__} needs "
            f"{tuple(made.cos.shape)}"
        )
    _TABLES[rotary] = table
    _GIVEN.add(table)


def require_trusted(model: PreTrainedModel) -> RopeTable:
    """Return the model's table, or refuse one that nobody vouches for.

    Raises:
        UnsupportedError: this host's torch is not known to make the contract's table.
    """
    table = rope_table(model)
    if stock_order().follows or table in _GIVEN or table.digest in KNOWN_ROPE_TABLES:
        return table
    raise UnsupportedError(
        f"{type(model).__name__}: RoPE table {table.digest} was made on this host and is not among the known ones; "
        f"{stock_order().reason}. Take the publisher's: kvkern.patch(model, scope='model', "
        "rope_table=store.rope_table(digest))."
    )


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
            raise UnsupportedError(f"{type(rotary).__name__} does not rotate halves: outside the numeric contract")
        halves.append(left.contiguous())
    return RopeTable(*halves)
