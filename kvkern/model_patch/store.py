"""Store and Prefix: publish a model's KV of a document, open it for a model, prepare readers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvkern.contract import TILE_TOKENS
from kvkern.errors import LayoutError, SpecMismatchError, UnsupportedError
from kvkern.layout import (
    BLOCK_TILES,
    GRACE_S,
    BlockStore,
    Collected,
    Document,
    Explanation,
    MappedPool,
    Published,
    Report,
    Summary,
    blocks_for,
    map_pool,
    upload,
)
from kvkern.layout.index import token_tensor
from kvkern.spec import ABSENT, PRODUCERS
from kvkern.tables import RopeTable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from kvkern.model_patch.cache import PrefixCache
    from kvkern.model_patch.recompute import Recomputed
    from kvkern.spec import KVSpec

    Progress = Callable[[int, int], None]


class Store:
    """A directory of published documents.

    Args:
        root: the directory, created when missing.

    Example:
        >>> store = kvkern.Store("kv-store")                                      # doctest: +SKIP
        >>> done = store.publish(model, tokenizer(text).input_ids)                # doctest: +SKIP
        >>> kvkern.patch(model)                                                   # doctest: +SKIP
        >>> with store.open(done.digest, model) as prefix:                        # doctest: +SKIP
        ...     out = model.generate(**prefix.prepare(question_ids), max_new_tokens=64)
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Open or create the store."""
        self.blocks = BlockStore(root)

    def publish(
        self,
        model: PreTrainedModel,
        doc_ids: Tensor | Sequence[int],
        *,
        producer: str = "stock",
        attention: str = "exact",
        salt: str = "",
        progress: Progress | None = None,
    ) -> Published:
        """Compute a document's KV by one prefill, and publish it. The model is left as it is.

        Args:
            model: a causal LM with full causal attention, in bf16, patched or not.
            doc_ids: `[n]` or `[1, n]` token ids.
            producer: `stock`: the model's own operations. `contract`: the whole model under the numeric contract; the
                store keeps the RoPE table beside the blocks.
            attention: of producer `stock`. `exact`: the bits of stock `eager`, whatever the model attends by; kvkern's
                attention computes them, without a score matrix of all queries by all keys. `model`: the model as it is;
                what it attends by is recorded, and so is `torch.compile`.
            salt: keeps documents of different owners apart.
            progress: called with (done, total) bytes while blocks are written.

        Returns:
            Published(digest, tokens, blocks_new, blocks_reused, payload_bytes).

        Raises:
            UnsupportedError: the model or the producer is outside what kvkern publishes.
            LayoutError: the ids are malformed, or KV holds NaN or infinity.

        Bits:
            KV is what the model computed, unchanged. Stock's KV of a token depends on the length of the prefill
            once it crosses 1,024 tokens. The contract's is a function of weights and tokens alone, and so is the
            document's digest: the same from any machine, thread count and chunking.
        """
        from kvkern.model_patch.as_configured import require_as_configured, require_no_dropout
        from kvkern.model_patch.computing import prefill, publisher_of
        from kvkern.model_patch.identity import spec_of
        from kvkern.model_patch.register import under_contract
        from kvkern.model_patch.rope import require_trusted
        from kvkern.model_patch.support import require_supported

        if producer not in PRODUCERS:
            raise UnsupportedError(f"producer {producer!r} is not available: take {' or '.join(map(repr, PRODUCERS))}")
        if producer == "contract" and attention != "exact":
            raise UnsupportedError(f"attention={attention!r} goes with producer 'stock': the contract fixes attention")
        require_supported(model)
        ids = token_tensor(doc_ids, "doc_ids")[None]
        if producer == "contract":
            with under_contract(model):  # refuses before the weights are read
                require_as_configured(model, to_publish=True)
                spec = spec_of(model, producer=producer, salt=salt)
                k, v = prefill(model, ids)
            self.blocks.put_table(require_trusted(model).to_bytes())
            return self.put(spec, ids, k, v, progress=progress)
        require_as_configured(model, to_publish=True)
        require_no_dropout(model)
        publisher, attended_by = publisher_of(model, attention, ids.numel())
        spec = spec_of(model, salt=salt, attn_implementation=attended_by)
        k, v = prefill(publisher, ids)
        return self.put(spec, ids, k, v, progress=progress)

    def put(
        self,
        spec: KVSpec,
        token_ids: Tensor | Sequence[int],
        k: Tensor,
        v: Tensor,
        *,
        progress: Progress | None = None,
    ) -> Published:
        """Publish KV that the caller has; see `layout.BlockStore.put` for shapes and errors."""
        return self.blocks.put(spec, token_ids, k, v, progress=progress)

    def open(
        self,
        digest: str,
        model: PreTrainedModel,
        *,
        producer: str | None = None,
        salt: str | None = None,
        check: str = "spec",
        progress: Progress | None = None,
    ) -> Prefix:
        """Verify a document, map it, and bind it to the model that will read it.

        Args:
            digest: the document's name, or at least its first 8 hex digits.
            model: the model; its weights digest is computed once and kept until a weight changes.
            producer: insist on a producer; None accepts any.
            salt: the salt it was published with; None means the empty salt.
            check: `spec`: the model's spec must be the document's. `recompute`: the first and the last 64 tokens of the
                prefix are computed again too, at every open, and compared; `Prefix.recomputed` says by which rule.
            progress: called with (done, total) bytes while blocks are verified.

        Returns:
            A Prefix; also a context manager.

        Raises:
            IntegrityError: stored bytes are not what their digest names; the file is named.
            SpecMismatchError: the model, producer or salt differs; the field and both values are named.
            UnsupportedError: the model computes something that no field of a spec names, such as a hook; it is named.
            KVMismatchError: the stored KV is not what this model computes.
            LayoutError: no such document, or a file of another form.
        """
        from kvkern.model_patch.whole import is_entered

        _require_check(check)
        stored = self.blocks.manifest(digest).spec
        found = difference(stored, model, producer, salt, contract=is_entered(model))
        if found is not None:
            raise SpecMismatchError(*found)
        return self._checked(Prefix(self.blocks.get(digest, progress=progress), model), check)

    def match(
        self,
        token_ids: Tensor | Sequence[int],
        model: PreTrainedModel,
        *,
        producer: str | None = None,
        salt: str | None = None,
        check: str = "spec",
    ) -> Prefix | None:
        """Open the longest published beginning of a prompt.

        Args:
            token_ids: `[n]` or `[1, n]`, the whole prompt.
            model: the reader.
            producer: insist on a producer; None accepts any.
            salt: the salt it was published with; None means the empty salt.
            check: as `open` takes it, over the tokens that match.

        Returns:
            A Prefix of `prefix.tokens` tokens, fewer than n, so that `prefix.prepare(token_ids[prefix.tokens:])` goes
            on; None when no document begins like the prompt. Its tokens were compared with the verified blocks.

        Raises:
            LayoutError: the ids are malformed.
            UnsupportedError, KVMismatchError: as `open`.

        Bits:
            KV is what the document's publisher computed. Stock's KV of a token depends on the length of the prefill
            once that crosses 1,024 tokens, so a match within a longer document may differ from a prefill of its own.
        """
        from kvkern.model_patch.whole import is_entered

        _require_check(check)
        ids, under = token_tensor(token_ids), is_entered(model)
        if ids.numel() == 1:
            return None
        specs = {line.spec.digest: line.spec for line in self.blocks.ls()}
        mine = (digest for digest, spec in specs.items() if not difference(spec, model, producer, salt, contract=under))
        found = [match for match in (self.blocks.match(digest, ids[:-1]) for digest in mine) if match]
        if not found:
            return None
        document, tokens = max(found, key=lambda match: match[1])
        return self._checked(Prefix(document, model, tokens), check)

    def _checked(self, prefix: Prefix, check: str) -> Prefix:
        """Refuse what the spec cannot name, and recompute where that is asked for."""
        from kvkern.model_patch.as_configured import require_as_configured
        from kvkern.model_patch.recompute import recompute

        require_as_configured(prefix.model)
        if check == "spec":
            return prefix
        if prefix.spec.producer == "contract":
            take_table(self, prefix)
        return replace(prefix, recomputed=recompute(prefix, prefix.model))

    def why(
        self, token_ids: Tensor | Sequence[int], model: PreTrainedModel, *, salt: str | None = None
    ) -> list[Explanation]:
        """Explain for every document how many of the tokens it serves this model, and what differs; best first."""
        from kvkern.model_patch.as_configured import unnamed_change
        from kvkern.model_patch.identity import spec_of

        found = self.blocks.why(token_ids, spec_of(model, salt=salt or ""))
        change = unnamed_change(model)
        if change is None:
            return found
        unnamed = ("computation", "as its configuration says", change)
        return [replace(line, differences=(unnamed, *line.differences)) for line in found]

    def rope_table(self, digest: str) -> RopeTable:
        """Return the RoPE table that a document of producer `contract` was computed with.

        Raises:
            IntegrityError: the stored table is damaged or missing; the file is named.
            LayoutError: no such document, or one of another producer.
        """
        spec = self.blocks.manifest(digest).spec
        if spec.producer != "contract":
            raise LayoutError(f"document {digest} was published by producer {spec.producer!r}: it has no RoPE table")
        return RopeTable.from_bytes(self.blocks.table(spec.producer_info.get("rope_table", ABSENT)), spec.head_dim)

    def remove(self, digest: str) -> str:
        """Take a document out of the list; see `layout.BlockStore.remove`."""
        return self.blocks.remove(digest)

    def gc(self, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
        """Take back the space of blocks that no document needs; see `layout.BlockStore.gc`."""
        return self.blocks.gc(grace_s=grace_s, dry_run=dry_run)

    def ls(self) -> list[Summary]:
        """Return the published documents."""
        return self.blocks.ls()

    def verify(self, digest: str | None = None, *, progress: Progress | None = None) -> Report:
        """Check every byte of a document, or of the whole store, and return all defects found."""
        return self.blocks.verify(digest, progress=progress)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A published document, verified and mapped, bound to the model that reads it. Any number of readers share it.

    Attributes:
        document: manifest and mapped shards.
        model: the reader.
        length: leading tokens of the document that belong to the prefix; None for all.
        recomputed: what `open(check="recompute")` has found.
    """

    document: Document
    model: PreTrainedModel
    length: int | None = None
    recomputed: Recomputed | None = None

    @property
    def digest(self) -> str:
        """The document's name."""
        return self.document.manifest.digest

    @property
    def spec(self) -> KVSpec:
        """What made the KV."""
        return self.document.manifest.spec

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return self.document.manifest.num_tokens if self.length is None else self.length

    @cached_property
    def token_ids(self) -> Tensor:
        """The prefix's token ids, `[tokens]` int64."""
        return self.document.token_ids()[: self.tokens]

    @cached_property
    def pool(self) -> MappedPool:
        """What kernels read: the mapped shards, in place; on a GPU one arena that all readers of this prefix share."""
        pool = map_pool(self.document.shards[: blocks_for(self.tokens)])
        return pool if self.model.device.type == "cpu" else upload(pool, self.model.device)

    def prepare(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        cache: PrefixCache | None = None,
        after: Tensor | None = None,
        whole_prompt: bool = False,
    ) -> dict[str, Any]:
        """Build the inputs of `model.generate(**inputs)` or `model(**inputs)` for readers of this document.

        Args:
            input_ids: tokens that follow the document: `[T]`, `[B, T]`, or a list of rows of different length.
                Every row is a reader.
            attention_mask: `[B, T]`, 0 where a tokenizer has padded, on either side.
            cache: a live cache of this prefix, for a further turn; a fresh one when None.
            after: the output of the last `generate()` on that cache. Its last token was sampled and never read by the
                model, so it is put in front of `input_ids`. Leave it out when `input_ids` begins with that token.
                Rows that ended early keep the padding that generate() gave them, as in transformers.
            whole_prompt: for `generate()`: return the ids of the whole prompt, the document and earlier turns first.
                transformers leaves out what the cache has, so nothing is computed twice; whatever reads ids sees all of
                them (repetition penalties, n-grams, `max_length`, streamers), and the output begins with the document,
                as in stock. A further turn needs `after`, of inputs prepared in this way, too. Assisted decoding takes
                inputs without it.

        Returns:
            `input_ids [B, T]`, `attention_mask [B, columns + T]`, `past_key_values`, and `position_ids [B, T]` where
            rows are padded. Padding of ragged rows stands between the prefix and the tokens; the output of generate()
            begins with `input_ids`, without the document. With whole_prompt `input_ids [B, columns + T]` are padded on
            the left, as by a tokenizer, while the mask's padding stays in the columns where the cache has it.

        Raises:
            UnsupportedError: no token is given: the prefix would cover the whole prompt.
            LayoutError: ids, mask, cache or after are malformed or do not belong together.
        """
        from kvkern.model_patch.inputs import prepare

        return prepare(
            self, input_ids, attention_mask=attention_mask, cache=cache, after=after, whole_prompt=whole_prompt
        )

    def tail(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return K `[kv_heads, head_dim, t]` and V `[kv_heads, t, head_dim]` of the t = tokens % 64 last tokens."""
        count = self.tokens % TILE_TOKENS
        tile = self.tokens // TILE_TOKENS
        if count == 0:
            tile -= 1
        shard = self.document.shards[tile // BLOCK_TILES]
        k, v = shard.k[tile % BLOCK_TILES, layer], shard.v[tile % BLOCK_TILES, layer]
        return k[..., :count], v[..., :count, :]

    def __enter__(self) -> Prefix:
        """Return the prefix."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave; the mappings go when the last reader's cache goes."""


def take_table(store: Store, prefix: Prefix) -> None:
    """Where this host's mathematical library makes another RoPE table, take the document's, if it may be one.

    Raises:
        UnsupportedError: it is not what another library could have made of this model's RoPE.
    """
    from kvkern.model_patch.rope import give_rope_table, rope_table

    if rope_table(prefix.model).digest != prefix.spec.producer_info.get("rope_table"):
        give_rope_table(prefix.model, store.rope_table(prefix.digest))


def _require_check(check: str) -> None:
    if check not in ("spec", "recompute"):
        raise UnsupportedError(f"check is {check!r}: take 'spec' or 'recompute'")


def difference(
    stored: KVSpec, model: PreTrainedModel, producer: str | None, salt: str | None, *, contract: bool
) -> tuple[str, Any, Any] | None:
    """Return what keeps a model from reading KV of a spec: (field, stored, wanted).

    Args:
        stored: the document's.
        model: the reader.
        producer: that it insists on.
        salt: None means the empty salt.
        contract: the reader computes under the contract, so the tables of a contract document matter too.
    """
    from kvkern.model_patch.identity import contract_info, spec_of

    if (dtype := str(model.dtype).removeprefix("torch.")) != stored.dtype:
        return "dtype", stored.dtype, dtype
    if producer not in (None, stored.producer):
        return "producer", stored.producer, producer
    found = stored.first_difference(spec_of(model, salt=salt or ""), ignore=("producer", "producer_info"))
    if found is not None or not contract or stored.producer != "contract":
        return found
    info = contract_info(model)
    names = sorted({*info, *stored.producer_info})
    pairs = ((name, stored.producer_info.get(name, ABSENT), info.get(name, ABSENT)) for name in names)
    return next(((f"producer_info.{name}", theirs, mine) for name, theirs, mine in pairs if theirs != mine), None)
