"""The digest of a model's weights: every byte through SHA-256, in parallel, kept until a weight changes."""

from __future__ import annotations

import ctypes
import functools
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
    from collections.abc import Mapping, Sequence


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


_DIGESTS: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, str]]] = weakref.WeakKeyDictionary()
_LINE_BYTES = 64
_LINES = 6
"""Cache lines of every tensor that are read again at each call, to notice writes that torch does not count."""


def model_weights_digest(model: torch.nn.Module) -> str:
    """Digest a model's `state_dict()`, remembering the answer while the model stays unchanged.

    Raises:
        UnsupportedError: an entry of the state dict is not a dense tensor; the message names it.
    """
    return cached_weights_digest(model, "state_dict", model.state_dict(keep_vars=True))


def cached_weights_digest(owner: torch.nn.Module, what: str, tensors: Mapping[str, Any]) -> str:
    """Digest named weights of a module, remembering the answer while they stay unchanged.

    The memory is keyed by name, identity, address, version counter, shape and dtype of every tensor, and by
    the bytes of a few cache lines of each. A write that torch does not count (through `.data` or a numpy alias) is
    seen when it changes a whole tensor; one to a few elements is not.

    Args:
        owner: the module; the memory goes when it goes.
        what: which weights of it, the memory's key.
        tensors: names to tensors.

    Raises:
        UnsupportedError: an entry is not a dense tensor; the message names it.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"state_dict entry {name!r} is a {type(value).__name__}, not a tensor: its effect "
                "on KV is unknown. Use a model without extra state."
            )
    if any(tensor.is_inference() for tensor in tensors.values()):
        return weights_digest(tensors)  # inference tensors carry no version counter
    key = [
        (name, weakref.ref(t), t.data_ptr(), t._version, tuple(t.shape), t.stride(), t.dtype, lines)
        for (name, t), lines in zip(tensors.items(), _samples(list(tensors.values())), strict=True)
    ]
    memory = _DIGESTS.setdefault(owner, {})
    known = memory.get(what)
    if known is None or not _same_tensors(known[0], key):
        known = memory[what] = (key, weights_digest(tensors))
    return known[1]


def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """Read a few cache lines of the memory of each tensor, spread over it."""
    lines: list[bytes] = [b""] * len(tensors)
    elsewhere: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        if not _has_memory(tensor):
            continue
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = extent * tensor.element_size()
        if tensor.device.type == "cpu":
            address, length = tensor.data_ptr(), min(_LINE_BYTES, size)
            lines[i] = b"".join([ctypes.string_at(address + place, length) for place in _places(size)])
        else:
            memory = tensor.detach().as_strided((extent,), (1,)).view(torch.uint8)
            parts = [memory[place : place + _LINE_BYTES] for place in _places(size)]
            elsewhere.setdefault(tensor.device, []).append((i, torch.cat(parts)))
    for found in elsewhere.values():  # one copy from each device
        every = torch.cat([part for _, part in found]).cpu().split([part.numel() for _, part in found])
        for (i, _), part in zip(found, every, strict=True):
            lines[i] = part.numpy().tobytes()
    return lines


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements lie where its address says; a subclass may keep them elsewhere."""
    kind = type(tensor)
    if kind not in (Tensor, torch.nn.Parameter) and kind.__module__.partition(".")[0] != "bitsandbytes":
        return False
    return bool(tensor.numel()) and not tensor.is_meta and tensor.layout == torch.strided and tensor.data_ptr() != 0


@functools.lru_cache(maxsize=4096)
def _places(size: int) -> tuple[int, ...]:
    """Offsets of the lines in `size` bytes, at growing distances: equal ones could meet the same column of all rows."""
    last = max(size - _LINE_BYTES, 0)
    steps = _LINES * (_LINES - 1)
    return tuple(sorted({last * i * (i + 1) // steps // 8 * 8 for i in range(_LINES)}))


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
