"""PrefixCache: the cache that transformers sees. One shared prefix in place, and each reader's own suffix tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvkern.contract import TILE_TOKENS
from kvkern.errors import KvkernError, UnsupportedError
from kvkern.kernels import native
from kvkern.model_patch.agreement import require_positions, require_same_padding
from kvkern.model_patch.gradients import would_flow
from kvkern.model_patch.register import IMPLEMENTATION, is_patched
from kvkern.view import KVView, append

if TYPE_CHECKING:
    from torch import Tensor

    from kvkern.model_patch.store import Prefix

HANDLE_ATTRIBUTE = "kvkern_handle"
_HALF_UPDATED = "this cache is half updated, an earlier forward was interrupted: take a fresh one from prepare()"


@dataclass(frozen=True)
class _Step:
    """What one forward adds, the same for all layers.

    Attributes:
        columns: columns of the cache before and after it.
        mask: `[B, columns after]` bool on the CPU, False where padded.
        query_len: `[B]` int32 on the CPU, tokens that are no padding.
        suffix_len: `[B]` int32 on the CPU, suffix tokens after it.
        slots: suffix slots of the longest reader after it.
        first_slot: `[B]` int32 on the model's device, where the tokens go in the suffix tiles.
    """

    columns: tuple[int, int]
    mask: Tensor
    query_len: Tensor
    suffix_len: Tensor
    slots: int
    first_slot: Tensor


class PrefixCache(Cache):
    """A cache over an attached prefix, made by `Prefix.prepare`. Readers share the prefix; each owns a suffix.

    Columns are what transformers counts: prefix, then padding of ragged questions, then tokens. Padding is never
    stored.
    """

    def __init__(self, prefix: Prefix, batch: int) -> None:
        super().__init__(layers=[PrefixCacheLayer(prefix.tokens) for _ in range(prefix.spec.num_layers)])
        self.prefix = prefix
        self._mask = torch.ones(batch, prefix.tokens, dtype=torch.bool)
        self._suffix_len = torch.zeros(batch, dtype=torch.int32)
        self._tail = prefix.tokens % TILE_TOKENS
        self._device = prefix.model.device
        self._shared = {
            "pool": prefix.pool.anchor,
            "block_table": prefix.pool.block_table[None].contiguous().to(self._device),
            "prefix_len": torch.tensor([prefix.tokens], dtype=torch.int32, device=self._device),
            "num_layers": prefix.spec.num_layers,
        }
        self.prompt_start = prefix.tokens  # the column that the input_ids of the last prepare() begin with
        self._step: _Step | None = None
        self._lengths: dict[str, Tensor] = {}  # what the layers' views hold, written in place
        self.workspace: tuple[object, Tensor] | None = None  # the shapes that it is for, and itself

    @property
    def columns(self) -> int:
        """Columns that complete forwards have added, the prefix among them."""
        return self.layers[-1].columns

    @property
    def lens(self) -> Tensor:
        """`[B]` int32, tokens of each reader, prefix included and padding not."""
        return self._suffix_len + self.prefix.tokens

    @property
    def is_pending(self) -> bool:
        """Whether prepare() has announced tokens that no forward has brought yet."""
        return self._mask.shape[1] > self.columns

    def announce(self, mask: Tensor, *, whole_prompt: bool = False) -> Tensor:
        """Record the padding of the tokens that come next.

        Args:
            mask: `[B, T]` bool, False where padded.
            whole_prompt: the input_ids hold the tokens of all columns, not of these alone.

        Returns:
            The mask of all columns, `[B, columns + T]` bool.
        """
        self.prompt_start = 0 if whole_prompt else self.columns
        self._mask = torch.cat([self._mask, mask], dim=1)
        return self._mask

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new K and V to the suffix tiles of a layer.

        Args:
            key_states: `[B, kv_heads, T, head_dim]` bf16, after RoPE.
            value_states: the same shape and dtype.
            layer_idx: the layer; layers come in rising order within a forward.

        Returns:
            Twice an empty meta tensor that carries a `LayerHandle`: whatever is not kvkern's attention fails on it
            instead of computing something.

        Raises:
            UnsupportedError: the model is not patched, a dtype or head_dim is not supported, or the batch changed.
            KvkernError: an earlier forward on this cache was interrupted.
        """
        layer: PrefixCacheLayer = self.layers[layer_idx]
        if layer_idx == 0:
            self._begin_step(key_states)
        step = self._step
        if step is None or step.columns[0] != layer.columns:
            raise KvkernError(_HALF_UPDATED)
        if key_states.shape != value_states.shape:
            raise UnsupportedError(
                f"value states {tuple(value_states.shape)} differ from key states {tuple(key_states.shape)}: "
                "kvkern needs one head_dim for both"
            )
        batch, heads, _, head_dim = key_states.shape
        if step.slots > (0 if layer.suffix_k is None else layer.suffix_k.shape[2] * TILE_TOKENS):
            layer.reserve(batch, heads, head_dim, step.slots, self.prefix.tail(layer_idx), self._device)
        append(
            native.dense_rows(key_states),
            native.dense_rows(value_states),
            layer.suffix_k,
            layer.suffix_v,
            step.first_slot,
            self._lengths["query_len"],
        )
        layer.columns = step.columns[1]
        handle = torch.empty((0, 0, 0, 0), device="meta")  # a model that cuts or repeats it comes as far as attention
        recorded = (key_states, value_states) if would_flow(key_states, value_states) else ()
        setattr(handle, HANDLE_ATTRIBUTE, LayerHandle(self, layer_idx, recorded))
        return handle, handle

    def _begin_step(self, key_states: Tensor) -> None:
        config = self.prefix.model.config
        if not is_patched(config):
            raise UnsupportedError(
                f"a PrefixCache under attention {config._attn_implementation!r}: the model is not patched. "
                f"Call kvkern.patch(model), which selects {IMPLEMENTATION!r}, before it reads an attached prefix."
            )
        if key_states.dtype != torch.bfloat16:
            raise UnsupportedError(f"keys in {key_states.dtype}: kvkern caches bfloat16")
        if key_states.device != self._device:
            raise UnsupportedError(
                f"keys on {key_states.device}, the cache is on {self._device}: the model was moved. Open the document "
                "and prepare the inputs again."
            )
        if self.layers[0].columns != self.columns:
            raise KvkernError(_HALF_UPDATED)
        self._expand(key_states.shape[0])
        before = self.layers[0].columns
        after = before + key_states.shape[2]
        if self._mask.shape[1] < after:
            ones = self._mask.new_ones(self._mask.shape[0], after - self._mask.shape[1])
            self._mask = torch.cat([self._mask, ones], dim=1)
        query_len = self._mask[:, before:after].sum(1, dtype=torch.int32)
        first_slot = (self._suffix_len + self._tail).to(self._device)
        suffix_len = self._suffix_len + query_len
        slots = int(suffix_len.max()) + self._tail
        self._set_lengths(suffix_len=suffix_len, query_len=query_len)
        self._step = _Step((before, after), self._mask[:, :after], query_len, suffix_len, slots, first_slot)
        self._suffix_len = suffix_len

    def _set_lengths(self, **lengths: Tensor) -> None:
        """Say how long the readers are: in place, so that views stay; with new views when the batch is another."""
        if not self._lengths or self._lengths["query_len"].shape != lengths["query_len"].shape:
            with torch.inference_mode(False):  # a tensor made under it could not be written outside of it
                like = torch.zeros(len(lengths["query_len"]), dtype=torch.int32, device=self._device)
                self._lengths = {name: like.clone() for name in ("reader_prefix", *lengths)}
            for layer in self.layers:
                layer.view = None
        for name, new in lengths.items():
            self._lengths[name].copy_(new)

    def _expand(self, batch: int) -> None:
        """Beams and several returned sequences repeat the rows that prepare() knew."""
        known = self._mask.shape[0]
        if batch == known:
            return
        if batch % known or self.columns != self.prefix.tokens:
            raise UnsupportedError(
                f"a batch of {batch} rows on a cache of {known}: take a cache for this batch from prepare()"
            )
        self.batch_repeat_interleave(batch // known)

    def view(self, layer_idx: int) -> KVView:
        """Return what the kernel reads in one layer of the present forward."""
        layer = self.layers[layer_idx]
        if layer.view is None:
            tiles = {"suffix_k": layer.suffix_k, "suffix_v": layer.suffix_v}
            layer.view = KVView(**self._shared, **self._lengths, **tiles, layer=layer_idx)
        return layer.view

    def require_agreement(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Refuse a forward whose mask or positions are not those of this cache.

        Raises:
            UnsupportedError: attention_mask is not the padding that prepare() announced, or position_ids do not go on
                from the tokens that each reader has.
        """
        step = self._step
        require_same_padding(attention_mask, step.mask)
        require_positions(position_ids, step.suffix_len + (self.prefix.tokens - 1), step.query_len)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every reader; a negative count, as in transformers."""
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        columns = self.columns - count
        if columns < self.prefix.tokens or not bool(self._mask[:, columns : self.columns].all()):
            raise UnsupportedError(f"crop of {count} tokens would cut into the shared prefix or into padding")
        self._mask = self._mask[:, :columns]
        self._suffix_len = self._suffix_len - count
        for layer in self.layers:
            layer.columns = columns

    def reset(self) -> None:
        """Forget all suffixes; the prefix stays attached."""
        self._mask = self._mask[:, : self.prefix.tokens]
        self._suffix_len = torch.zeros_like(self._suffix_len)
        self.layers = [PrefixCacheLayer(self.prefix.tokens) for _ in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the suffixes for beam search; the prefix is shared and stays."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every reader `repeats` times."""
        self.batch_select_indices(torch.arange(self._mask.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the readers `indices`, in that order; their suffixes are copied."""
        self._mask = self._mask.index_select(0, indices.cpu())
        self._suffix_len = self._suffix_len.index_select(0, indices.cpu())
        tiles = -(-(int(self._suffix_len.max()) + self._tail) // TILE_TOKENS)
        for layer in self.layers:
            layer.select(indices.to(self._device), tiles)


@dataclass(frozen=True)
class LayerHandle:
    """What `PrefixCache.update` puts on the key, for the attention function to find."""

    cache: PrefixCache
    layer_idx: int
    recorded: tuple[Tensor, ...] = ()  # keys and values that a gradient would belong to

    def view(self, module: torch.nn.Module, attention_mask: Tensor | None, position_ids: Tensor | None) -> KVView:
        """Return what the kernel reads, for the module that attends.

        Raises:
            UnsupportedError: the module belongs to another model than the one that opened the prefix, or mask or
                positions are not those of the cache.
        """
        if module.config is not self.cache.prefix.model.config.get_text_config():
            raise UnsupportedError(
                "this cache belongs to another model object: open the document for the model that reads it"
            )
        if self.layer_idx == 0:
            self.cache.require_agreement(attention_mask, position_ids)
        return self.cache.view(self.layer_idx)


class PrefixCacheLayer(CacheLayerMixin):
    """The suffix tiles of one layer, and how many columns it has seen. PrefixCache does the updating."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.suffix_k: Tensor | None = None
        self.suffix_v: Tensor | None = None
        self.view: KVView | None = None  # over these tiles, until they move

    def reserve(
        self, batch: int, heads: int, head_dim: int, slots: int, tail: tuple[Tensor, Tensor], device: torch.device
    ) -> None:
        """Make room for `slots` suffix slots a reader, by doubling; new tiles begin with the prefix's tail.

        Args:
            batch: readers.
            heads: KV heads.
            head_dim: channels.
            slots: slots needed in all.
            tail: K `[heads, head_dim, t]` and V `[heads, t, head_dim]` of the prefix's last t tokens past its
                last full tile.
            device: the model's.
        """
        tiles = -(-slots // TILE_TOKENS)
        old_k, old_v = self.suffix_k, self.suffix_v
        if old_k is not None and tiles <= old_k.shape[2]:
            return
        self.view = None
        capacity = tiles + 1 if old_k is None else 2 * tiles
        options = {"dtype": torch.bfloat16, "device": device}
        self.suffix_k = torch.zeros(batch, heads, capacity, head_dim, TILE_TOKENS, **options)
        self.suffix_v = torch.zeros(batch, heads, capacity, TILE_TOKENS, head_dim, **options)
        if old_k is None:
            self.suffix_k[:, :, 0, :, : tail[0].shape[-1]] = tail[0]
            self.suffix_v[:, :, 0, : tail[1].shape[-2]] = tail[1]
        else:
            self.suffix_k[:, :, : old_k.shape[2]] = old_k
            self.suffix_v[:, :, : old_v.shape[2]] = old_v

    def select(self, rows: Tensor, tiles: int) -> None:
        """Take the given readers' first `tiles` tiles."""
        self.view = None
        if self.suffix_k is not None:
            self.suffix_k = self.suffix_k[:, :, :tiles].index_select(0, rows)
            self.suffix_v = self.suffix_v[:, :, :tiles].index_select(0, rows)

    def get_seq_length(self) -> int:
        """Return the columns that this layer has seen: prefix, padding and suffix."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (key columns, offset of the first) for a forward of `query_length` columns."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the suffix grows without bound."""
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Unused: PrefixCache.update appends for all of its layers."""
        raise NotImplementedError("call PrefixCache.update")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Unused: `reserve` allocates on the first update."""
