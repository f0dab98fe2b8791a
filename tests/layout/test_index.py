"""Index: the longest published beginning is found, by keys that are the same everywhere."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.errors import LayoutError
from kvkern.layout import BlockStore
from kvkern.layout.index import chain_keys, decode_index, encode_index, matched_tokens, token_tensor

SPEC_DIGEST = "5" * 64
Make = Callable[..., Any]


def keys_by_hand(ids: list[int]) -> tuple[str, ...]:
    """Compute the keys as FORMAT.md words them, with nothing of ours."""

    def fields(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(struct.pack("<Q", len(p)) + p for p in parts)).digest()

    key, keys = fields(b"kvkern-chain-root-v1", bytes.fromhex(SPEC_DIGEST)), []
    for i in range(0, len(ids), 256):
        block = ids[i : i + 256]
        count = struct.pack("<I", len(block))
        key = fields(b"kvkern-chain-v1", key, count, struct.pack(f"<{len(block)}I", *block))
        keys.append(key.hex())
    return tuple(keys)


token_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40).map(
    lambda ids: (ids * 30)[: 1 + sum(ids) % 900]
)


@settings(max_examples=40, deadline=None)
@given(token_lists)
def test_index__keys_are_those_of_the_format(ids: list[int]) -> None:
    assert chain_keys(SPEC_DIGEST, torch.tensor(ids)) == keys_by_hand(ids)


@settings(max_examples=60, deadline=None)
@given(token_lists, token_lists, st.integers(0, 900))
def test_index__match_is_the_common_beginning(a: list[int], b: list[int], cut: int) -> None:
    b = a[:cut] + b
    query, stored = torch.tensor(a), torch.tensor(b)
    found = matched_tokens(
        query,
        chain_keys(SPEC_DIGEST, query),
        chain_keys(SPEC_DIGEST, stored),
        lambda i: stored[256 * i : 256 * i + 256],
    )
    want = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert found == (min(len(a), len(b)) if want is None else want)


def test_index__one_token_or_another_spec_changes_all_later_keys() -> None:
    ids = torch.arange(700)
    other = ids.clone()
    other[300] += 1
    a, b = chain_keys(SPEC_DIGEST, ids), chain_keys(SPEC_DIGEST, other)
    assert [x == y for x, y in zip(a, b, strict=True)] == [True, False, False]
    assert not set(a) & set(chain_keys("6" * 64, ids))


def test_index__damage_is_noticed() -> None:
    keys = keys_by_hand(list(range(300)))
    data = encode_index("a" * 64, keys)
    assert decode_index(data, "a" * 64, 2) == keys
    for i in range(0, len(data), 5):
        changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(LayoutError):
            decode_index(changed, "a" * 64, 2)
    for digest, blocks in (("b" * 64, 2), ("a" * 64, 3)):
        with pytest.raises(LayoutError):
            decode_index(data, digest, blocks)


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([[1, 2]]), torch.tensor([1, 2]).int()])
def test_token_ids__every_usual_form_is_accepted(ids: Any) -> None:
    assert torch.equal(token_tensor(ids), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "ids", [[], [[1], [2]], [1.5], [True], [-1], [1 << 31], [1 << 70], "text", None, torch.ones(2)]
)
def test_raises_token_ids__form(ids: Any) -> None:
    with pytest.raises(LayoutError, match="token_ids"):
        token_tensor(ids)


def test_find__a_partly_shared_block_counts_to_the_token(store: BlockStore, make: Make) -> None:
    sample = make(900)
    digest = sample.put(store).digest
    query = sample.ids.clone()
    query[700:] += 1
    assert store.find(sample.spec.digest, query) == [(digest, 700)]
    assert store.find(sample.spec.digest, sample.ids[:700]) == [(digest, 700)]
    assert store.find(sample.spec.digest, sample.ids[:512]) == [(digest, 512)]
    assert store.find(sample.spec.digest, sample.ids) == [(digest, 900)]
    longer = torch.cat([sample.ids, torch.tensor([7, 8])])
    assert store.find(sample.spec.digest, longer) == [(digest, 900)]
    assert store.find(sample.spec.digest, sample.ids + 1) == []


def test_find__every_candidate_is_kept_longest_first(store: BlockStore, make: Make) -> None:
    sample = make(600)
    done = {n: sample.start(n).put(store).digest for n in (600, 300, 10)}
    sample.start(1).put(BlockStore(store.root))
    found = store.find(sample.spec.digest, sample.ids[:400])
    assert [n for _, n in found] == [400, 300, 10, 1]
    assert [d for d, _ in found][:3] == [done[600], done[300], done[10]]


def test_find__never_crosses_spec_producer_or_salt(store: BlockStore, make: Make) -> None:
    sample = make(300)
    sample.put(store)
    for change in ({"salt": "other"}, {"producer": "contract"}, {"weights": "f" * 64}):
        assert store.find(replace(sample.spec, **change).digest, sample.ids) == []


@pytest.mark.parametrize("damage", ["missing", "damaged", "all gone"])
def test_index__thrown_away_is_rebuilt(store: BlockStore, make: Make, damage: str) -> None:
    sample = make(600)
    digest = sample.put(store).digest
    path: Path = store.root / "index" / f"{digest}.json"
    before = path.read_bytes()
    path.write_bytes(before[:-9]) if damage == "damaged" else path.unlink()
    if damage == "all gone":
        path.parent.rmdir()
        store = BlockStore(store.root)
    with pytest.warns(UserWarning, match="rebuilding"):
        assert store.find(sample.spec.digest, sample.ids[:580]) == [(digest, 580)]
    assert path.read_bytes() == before
    assert store.find(sample.spec.digest, sample.ids[:580]) == [(digest, 580)]


def test_find__one_damaged_document_does_not_hide_the_others(store: BlockStore, make: Make) -> None:
    good, bad = make(300), make(300, seed=1)
    bad.ids[:200] = good.ids[:200]
    good_digest, bad_digest = good.put(store).digest, bad.put(store).digest
    store.manifest_path(bad_digest).write_bytes(b"{}")
    with pytest.warns(UserWarning, match=bad_digest):
        assert store.find(good.spec.digest, good.ids) == [(good_digest, 300)]
