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

MOST_APART = 1e-3
"""Part of a given table's entries that may be one unit in the last place away from this host's."""

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
        UnsupportedError: it is not what another mathematical library could have made of this model's RoPE.
    """
    rotary = _rotary_of(model)
    made = _made(rotary, model.config.get_text_config())
    for name, given, own in (("cos", table.cos, made.cos), ("sin", table.sin, made.sin)):
        if given.shape != own.shape or given.dtype != torch.bfloat16:
            raise UnsupportedError(
                f"rope_table.{name} is {tuple(given.shape)} {given.dtype}, {type(model).__name__} needs "
                f"{tuple(own.shape)} torch.bfloat16"
            )
    if table.digest == made.digest:
        return
    apart = torch.cat([_apart(table.cos, made.cos), _apart(table.sin, made.sin)])
    is_known = stock_order().follows or made.digest in KNOWN_ROPE_TABLES
    if is_known or int(apart.max()) > 1 or int((apart > 0).sum()) > MOST_APART * apart.numel():
        raise UnsupportedError(
            f"rope_table {table.digest} is not this model's: {int((apart > 0).sum()):,} of {apart.numel():,} entries "
            f"differ from this host's, by up to {int(apart.max())} units in the last place; mathematical libraries "
            "differ in about one of 100,000, by one. Do not trust its publisher."
        )
    _TABLES[rotary] = table
    _GIVEN.add(table)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Units in the last place between bf16 values, by their order."""
    ordered = [x.view(torch.int16).to(torch.int32).reshape(-1) for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in ordered]
    return (ordered[0] - ordered[1]).abs()


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
    if rotary.inv_freq.dtype != torch.float32:
        raise UnsupportedError(
            f"RoPE frequencies are in {rotary.inv_freq.dtype}: model.to(dtype) has cast them. Load the model with "
            "dtype=torch.bfloat16 instead"
        )
    if rotary.inv_freq.device.type != "cpu":  # another device's powers and cosines are rounded in another way
        with torch.device("cpu"):
            rotary = type(rotary)(config)
    positions = torch.arange(config.max_position_embeddings, device="cpu")[None]
    like = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    halves = []
    for part in type(rotary).forward(rotary, like, positions):
        left, right = part[0].chunk(2, dim=-1)
        if not torch.equal(left, right):
            raise UnsupportedError(f"{type(rotary).__name__} does not rotate halves: outside the numeric contract")
        halves.append(left.contiguous())
    return RopeTable(*halves)
