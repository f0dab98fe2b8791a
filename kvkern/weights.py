"""The digest of a model's weights: every byte through SHA-256, in parallel, kept until a weight changes."""

from __future__ import annotations

import hashlib
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvkern.errors import UnsupportedError
from kvkern.spec import tagged_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest named weights: SHA-256 over name, dtype, shape, SHA-256 of the bytes, names sorted.

    Tensors are hashed side by side, the largest first; tied weights are hashed once.

    Args:
        tensors: names to dense tensors of any dtype and device.

    Returns:
        64 hex digits.

    Raises:
        UnsupportedError: a tensor has no dense bytes (meta, sparse); the message names it.
    """
    owners: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UnsupportedError(
                f"weight {name!r} is {tensor.layout} on {tensor.device}: it has no dense bytes to "
                "hash. Load the model fully first."
            )
        owners.setdefault(_storage_key(tensor), tensor)
    order = sorted(owners, key=lambda key: owners[key].nbytes, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        body = dict(zip(order, pool.map(lambda key: _sha256_of(owners[key]), order), strict=True))
    parts: list[bytes] = []
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        parts += [
            name.encode(),
            str(tensor.dtype).encode(),
            shape.encode(),
            body[_storage_key(tensor)],
        ]
    return tagged_sha256("kvkern-weights-v1", *parts).hex()


_MODEL_DIGESTS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def model_weights_digest(model: torch.nn.Module) -> str:
    """Digest a model's `state_dict()`, remembering the answer while the model stays unchanged.

    The memory is keyed by name, identity, address, version counter, shape and dtype of every
    tensor. Writes that torch does not count (through `.data` or a numpy alias) are not seen.

    Raises:
        UnsupportedError: an entry of the state dict is not a dense tensor; the message names it.
    """
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"state_dict entry {name!r} is a {type(value).__name__}, not a tensor: its effect "
                "on KV is unknown. Use a model without extra state."
            )
    if any(tensor.is_inference() for tensor in state.values()):
        return weights_digest(state)  # inference tensors carry no version counter
    key = [
        (name, weakref.ref(t), t.data_ptr(), t._version, tuple(t.shape), t.stride(), t.dtype)
        for name, t in state.items()
    ]
    known = _MODEL_DIGESTS.get(model)
    if known is None or not _same_tensors(known[0], key):
        known = _MODEL_DIGESTS[model] = (key, weights_digest(state))
    return known[1]


def _same_tensors(old: list[tuple[Any, ...]], new: list[tuple[Any, ...]]) -> bool:
    # Identity first: == between weak references to tensors would compare the tensors' elements.
    return len(old) == len(new) and all(
        a[1]() is b[1]() and (a[0], *a[2:]) == (b[0], *b[2:]) for a, b in zip(old, new, strict=True)
    )


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _sha256_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).digest()
