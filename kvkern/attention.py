"""The functional API: the attention, what would run (`resolve`), and the work space that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kvkern.contract import KEY_RUN, KEY_RUN_LONG
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import native
from kvkern.view import is_native, require_whole_words, validate
from kvkern.waived import waived

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from kvkern.view import KVView

KeyRun = Literal["stock", 512, 1024]
Profile = Literal["exact", "fast"]
Backend = Literal["auto", "c", "triton"]


@dataclass(frozen=True)
class Plan:
    """What a call would run.

    Attributes:
        backend: `c` or `triton`.
        profile: `exact` or `fast`.
        launches: kernel launches per layer; 1 for the C call.
        bytes_moved: bytes of K and V tiles, q and out, each read or written once.
        reason: why this backend, in words; and which models of this process were patched with `allow_other_bits`.
        workspace_bytes: see `new_workspace`; 0 for C, which has scratch of its own.
    """

    backend: str
    profile: str
    launches: int
    bytes_moved: int
    reason: str
    workspace_bytes: int = 0


def resolve(q: Tensor, kv: KVView, *, profile: Profile = "exact", backend: Backend = "auto") -> Plan:
    """Say which backend and profile `prefix_attention` would take, and what it would move.

    Args:
        q: `[B, num_q_heads, Tq, head_dim]` bf16.
        kv: the readers.
        profile: `exact` follows the numeric contract; `fast` takes tensor cores.
        backend: `auto` takes C on a CPU, and Triton on CUDA and ROCm.

    Returns:
        The plan.

    Raises:
        LayoutError: q or kv is malformed; the message names the field.
        UnsupportedError: no backend runs this profile on this device.
    """
    if profile not in ("exact", "fast"):
        raise UnsupportedError(f"profile is {profile!r}; this version has 'exact' and 'fast'")
    if backend not in ("auto", "c", "triton"):
        raise LayoutError(f"backend is {backend!r}; it must be 'auto', 'c' or 'triton'")
    is_c = _takes_c(q, backend, profile)
    if is_c:
        native.require_cpu(q)
    validate(q, kv)
    if profile == "fast":
        return _resolve_fast(q, kv, backend)
    if not is_c:
        from kvkern.kernels import triton_door

        triton_door.require_available(q.device)
        require_whole_words(q, kv)
    bytes_moved = _bytes_moved(q, kv)
    if is_c:
        reason = "tensors are on a CPU, where the C reference is the backend" + _said_of_waived()
        return Plan("c", profile, 1, bytes_moved, reason)
    reason = f"tensors are on {q.device}, {triton_door.architecture(q.device)}" + _said_of_waived()
    need = _space_needed(q, kv, profile, native.SCRATCH_BOUND_BYTES)[1]
    return Plan("triton", profile, triton_door.config_for(q.device).launches, bytes_moved, reason, need)


def _said_of_waived() -> str:
    """Say which patched models of this process have other bits of their own than these."""
    return "".join(f"; not the bits of {difference}" for difference in waived())


def _resolve_fast(q: Tensor, kv: KVView, backend: Backend) -> Plan:
    if backend == "c":
        raise UnsupportedError("profile 'fast' has no backend 'c': take 'auto' on a GPU, or profile 'exact'")
    from kvkern.kernels import fast_door, triton_door

    fast_door.require_available(q.device)
    fast_door.require_supported(q, kv.block_table, kv.block_tiles, kv.suffix_k, kv.pool)
    need = _space_needed(q, kv, "fast", 0)[1]
    reason = f"tensors are on {q.device}, {triton_door.architecture(q.device)}"
    return Plan("triton", "fast", fast_door.LAUNCHES, _bytes_moved(q, kv), reason, need)


def _bytes_moved(q: Tensor, kv: KVView) -> int:
    row_bytes = 2 * kv.suffix_k.shape[1] * q.shape[3] * q.element_size()
    prefix_len = kv.prefix_len.tolist()
    keys = sum(prefix_len[p] for p in set(kv.reader_prefix.tolist())) + sum(kv.suffix_len.tolist())
    return keys * row_bytes + 2 * q.numel() * q.element_size()


def _takes_c(q: Tensor, backend: Backend, profile: Profile = "exact") -> bool:
    return profile == "exact" and (backend == "c" or (backend == "auto" and is_native(q)))


def new_workspace(
    q: Tensor,
    kv: KVView,
    *,
    profile: Profile = "exact",
    backend: Backend = "auto",
    scratch_bound_bytes: int = native.SCRATCH_BOUND_BYTES,
) -> Tensor:
    """Return work space for calls of these shapes, its counters at 0.

    Every call leaves the counters at 0, so one work space serves all layers and steps, as long as its launches do not
    overlap. A captured graph needs one of its own.

    Args:
        q: as in `prefix_attention`; only its shape and device count.
        kv: the readers; only shapes count: lengths may change.
        profile: as in `prefix_attention`.
        backend: the same; C has scratch of its own, and takes an empty work space.
        scratch_bound_bytes: for `exact`; the call must name the same.

    Returns:
        `[n]` uint8 on the device of q.
    """
    if _takes_c(q, backend, profile):
        return torch.empty(0, dtype=torch.uint8, device=q.device)
    door, need = _space_needed(q, kv, profile, scratch_bound_bytes)
    return door.new_workspace(q, need)


def _space_needed(q: Tensor, kv: KVView, profile: Profile, scratch_bound_bytes: int) -> tuple[ModuleType, int]:
    from kvkern.kernels import fast_door, triton_door

    shapes = (q, kv.block_table, kv.block_tiles, kv.suffix_k)
    if profile == "fast":
        return fast_door, fast_door.workspace_bytes(fast_door.plan_for(*shapes))
    return triton_door, triton_door.scratch_bytes(*shapes, scratch_bound_bytes)


def prefix_attention(
    q: Tensor,
    kv: KVView,
    *,
    sm_scale: float | None = None,
    profile: Profile = "exact",
    key_run: KeyRun = "stock",
    backend: Backend = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    scratch_bound_bytes: int = native.SCRATCH_BOUND_BYTES,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend causally to shared prefixes and own suffixes, in place over their tiles.

    Args:
        q: `[B, num_q_heads, Tq, head_dim]` bf16, innermost axis dense. Rows before the last `query_len[b]` are padding.
        kv: the readers; query row t sees all keys but the last `Tq - 1 - t`.
        sm_scale: factor of the scores; `head_dim ** -0.5` when None.
        profile: `exact`, or `fast`: one launch on tensor cores, with bits of its own.
        key_run: for `exact`, keys of one output chain: 512 is the contract, "stock" follows stock eager's rule, 1024
            its long run.
        backend: `auto`, `c` or `triton`.
        return_lse: also return the log-sum-exp.
        out: `[B, Tq, num_q_heads, head_dim]` bf16 to write into; a new tensor when None.
        scratch_bound_bytes: long Tq is split so that scratch stays under it, or under what one query position of every
            reader needs (4 bytes a query head and key), whichever is more.
        workspace: what `new_workspace` returned for these shapes; when None a new one is made and its counters are
            cleared, which is a launch more.

    Returns:
        out, or (out, lse) with lse `[B, num_q_heads, Tq]` fp32 in natural log, -inf for padding rows.

    Raises:
        LayoutError: an argument is malformed; the message names it.
        UnsupportedError: no backend runs this.

    Bits:
        Out depends on q, the keys and values by position, sm_scale and key_run alone: not on the prefix boundary, the
        block table, the order of readers, threads, or the split of Tq. lse is accurate to fp32, and not part of the
        contract. Under `fast`, out and lse depend on q, the keys and values by position, sm_scale and
        `64 * (prefix_len // 64)` alone, on one device.

    Source:
        The order is that of Hugging Face `eager` on a CPU with AVX512_BF16 (numeric contract eager-bf16-v1, part A).

    Example:
        >>> import torch, kvkern
        >>> k, v = torch.randn(2, 1, 8, 300, 128).bfloat16()
        >>> q = torch.randn(1, 32, 1, 128).bfloat16()
        >>> kvkern.prefix_attention(q, kvkern.KVView.from_dense(k, v)).shape
        torch.Size([1, 1, 32, 128])
    """
    resolve(q, kv, profile=profile, backend=backend)
    if key_run not in ("stock", KEY_RUN, KEY_RUN_LONG):
        raise LayoutError(f"key_run must be 'stock', {KEY_RUN} or {KEY_RUN_LONG}, got {key_run!r}")
    batch, num_q_heads, rows, head_dim = q.shape
    shape = (batch, rows, num_q_heads, head_dim)
    if out is None:
        out = q.new_empty(shape)
    elif tuple(out.shape) != shape or out.dtype != torch.bfloat16 or out.stride(-1) != 1:
        raise LayoutError(f"out must be bfloat16 {shape} with a dense last axis, got {tuple(out.shape)} {out.dtype}")
    if workspace is not None and not _takes_c(q, backend, profile):
        door, need = _space_needed(q, kv, profile, scratch_bound_bytes)
        door.require_workspace(workspace, need, q.device)
    lse = torch.full((batch, num_q_heads, rows), -torch.inf, device=q.device) if return_lse else None
    vars(kv).pop("native_keys", None)  # its tensors may have moved since the last call
    launch(
        q, kv, out, lse, sm_scale=sm_scale, profile=profile, key_run=key_run, backend=backend,
        scratch_bound_bytes=scratch_bound_bytes, workspace=workspace,
    )  # fmt: skip
    return (out, lse) if lse is not None else out


def launch(
    q: Tensor,
    kv: KVView,
    out: Tensor,
    lse: Tensor | None,
    *,
    sm_scale: float | None = None,
    profile: Profile = "exact",
    key_run: KeyRun = "stock",
    backend: Backend = "auto",
    scratch_bound_bytes: int = native.SCRATCH_BOUND_BYTES,
    workspace: Tensor | None = None,
) -> None:
    """Run a call that has been validated: the hot path of the model patch. Arguments as in `prefix_attention`.

    The tensors of one `kv` must stay where they are from call to call; what they hold may change.
    """
    is_c = _takes_c(q, backend, profile)
    if workspace is None and not is_c:
        workspace = new_workspace(q, kv, profile=profile, backend=backend, scratch_bound_bytes=scratch_bound_bytes)
    if profile == "fast":
        from kvkern.kernels import ops

        ops.fast_attention(
            q, kv.pool, kv.block_table, kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len,
            kv.suffix_k, kv.suffix_v, out, lse, workspace,
            kv.block_tiles, kv.stride_tile, kv.layer_offset,
            q.shape[3] ** -0.5 if sm_scale is None else sm_scale,
        )  # fmt: skip
        return
    if not is_c:
        from kvkern.kernels import ops

        ops.exact_attention(
            q, kv.pool, kv.block_table, kv.prefix_len, kv.reader_prefix, kv.suffix_len, kv.query_len,
            kv.suffix_k, kv.suffix_v, out, lse, workspace,
            kv.block_tiles, kv.stride_tile, kv.layer_offset,
            q.shape[3] ** -0.5 if sm_scale is None else sm_scale, 0 if key_run == "stock" else key_run,
        )  # fmt: skip
        return
    native.attend(
        kv.native_keys, q, out, lse, sm_scale=q.shape[3] ** -0.5 if sm_scale is None else sm_scale,
        key_run=0 if key_run == "stock" else key_run, scratch_bound_bytes=scratch_bound_bytes,
    )  # fmt: skip
