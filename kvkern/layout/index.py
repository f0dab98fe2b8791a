"""Index: token-chain keys that find the longest published prefix; a hint, rebuilt at will."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvkern.errors import LayoutError
from kvkern.layout.header import MAX_TOKENS
from kvkern.layout.tiles import BLOCK_TOKENS
from kvkern.spec import canonical_json, is_digest, parse_json, tagged_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

FORMAT = "kvkern-index-v1"
_KEYS = {"check", "format", "keys", "manifest"}


def token_tensor(token_ids: Any, name: str = "token_ids") -> Tensor:
    """Check token ids and return them as `[n]` int64 on the CPU.

    Args:
        token_ids: `[n]` or `[1, n]` integers in [0, 2^31), as a tensor, an array or a sequence.
        name: what the caller calls them, for the message.

    Raises:
        LayoutError: they do not have this form.
    """
    try:
        ids = torch.as_tensor(token_ids).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise LayoutError(f"{name} must be integers [n] or [1, n]: {error}") from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    shape = tuple(ids.shape)
    if ids.dim() != 1 or not 0 < ids.numel() < MAX_TOKENS:
        raise LayoutError(f"{name} must be [n] or [1, n] with at least one id, got {shape}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise LayoutError(f"{name} must be integers, got {ids.dtype}")
    ids = ids.to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 1 << 31:
        raise LayoutError(f"{name} must lie in [0, 2^31), got {low} to {high}")
    return ids


def chain_keys(spec_digest: str, token_ids: Tensor) -> tuple[str, ...]:
    """Compute one key per block; equal keys mean equal spec and equal tokens from the start.

    `key_0 = H("kvkern-chain-root-v1", spec)` and `key_{i+1} = H("kvkern-chain-v1", key_i, count,
    token ids)`, numbers as u32 LE, H being SHA-256 over length-prefixed fields.

    Args:
        spec_digest: `KVSpec.digest`, which includes producer and salt.
        token_ids: `[n]` integers in [0, 2^31).

    Returns:
        `key_1, key_2, ...`, one per 256 tokens begun, 64 hex digits each.
    """
    if not is_digest(spec_digest):
        raise LayoutError(f"spec_digest must be 64 lower-case hex digits (KVSpec.digest), got {spec_digest!r}")
    ids = token_ids.to(device="cpu", dtype=torch.int32).numpy().astype("<u4")
    key = tagged_sha256("kvkern-chain-root-v1", bytes.fromhex(spec_digest))
    keys = []
    for start in range(0, len(ids), BLOCK_TOKENS):
        block: np.ndarray = ids[start : start + BLOCK_TOKENS]
        key = tagged_sha256("kvkern-chain-v1", key, len(block).to_bytes(4, "little"), block.tobytes())
        keys.append(key.hex())
    return tuple(keys)


def matched_tokens(
    query: Tensor,
    query_keys: Sequence[str],
    keys: Sequence[str],
    stored_tokens: Callable[[int], Tensor],
) -> int:
    """Count the leading tokens that a query shares with a document.

    Args:
        query: `[n]` token ids.
        query_keys: their chain keys.
        keys: the document's chain keys.
        stored_tokens: gives the token ids of the document's block i; called for one block at most.
    """
    common = min(len(query_keys), len(keys))
    same = next((i for i in range(common) if query_keys[i] != keys[i]), common)
    start = same * BLOCK_TOKENS
    if same == common:
        return min(start, query.numel())
    return start + common_tokens(query[start : start + BLOCK_TOKENS], stored_tokens(same))


def common_tokens(query: Tensor, stored: Tensor) -> int:
    """Count the leading tokens that two sequences share."""
    length = min(query.numel(), stored.numel())
    differs = (query[:length] != stored[:length]).nonzero()
    return int(differs[0]) if differs.numel() else length


def encode_index(manifest_digest: str, keys: Sequence[str]) -> bytes:
    """Encode the index file of one manifest as canonical JSON with a check over its content."""
    check = _check(manifest_digest, keys)
    obj = {"check": check, "format": FORMAT, "keys": list(keys), "manifest": manifest_digest}
    return canonical_json(obj)


def decode_index(data: bytes, manifest_digest: str, num_blocks: int) -> tuple[str, ...]:
    """Decode an index file.

    Raises:
        LayoutError: the file is damaged or belongs to another manifest; rebuild it.
    """
    name = f"index {manifest_digest}.json"
    obj = parse_json(data, name)
    if set(obj) != _KEYS or obj["format"] != FORMAT or obj["manifest"] != manifest_digest:
        raise LayoutError(f"{name}: not a {FORMAT} file of this manifest")
    keys = obj["keys"]
    if not isinstance(keys, list) or len(keys) != num_blocks or not all(map(is_digest, keys)):
        raise LayoutError(f"{name}: field 'keys' must hold {num_blocks} keys")
    if obj["check"] != _check(manifest_digest, keys):
        raise LayoutError(f"{name}: field 'check' does not fit the keys")
    return tuple(keys)


def _check(manifest_digest: str, keys: Sequence[str]) -> str:
    return tagged_sha256("kvkern-index-v1", manifest_digest.encode(), *(k.encode() for k in keys)).hex()
