"""Audit: forgeries whose digests and manifest the forger has made consistent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import kvkern
from kvkern.model_patch.store import Prefix, Store
from tests.support.models import small_qwen3

DOCUMENT_TOKENS = 330  # two blocks, the last tile partly filled
KINDS = ("one bit", "one token", "one layer", "one head", "one token changed, the rest recomputed")


class Forger:
    """Publishes KV that is not what the model computes, under the model's own spec and producer 'contract'."""

    def __init__(self, root: Path) -> None:
        self.subject = small_qwen3()
        self.model = self.subject.model
        self.store = Store(root)
        self.ids = self.subject.doc(DOCUMENT_TOKENS)
        with self.open(self.store.publish(self.model, self.ids, producer="contract").digest) as prefix:
            self.spec = prefix.spec
            self.k, self.v = self._dense(prefix)

    def open(self, digest: str) -> Prefix:
        return self.store.open(digest, self.model)

    def forge(self, kind: str, chance: random.Random) -> tuple[Prefix, tuple[int, int, int] | int]:
        """Return the forgery, opened, and where it begins: (token, layer, head), or the token."""
        k, v = self.k.clone(), self.v.clone()
        layers, heads, tokens, channels = k.shape
        layer, head, token = chance.randrange(layers), chance.randrange(heads), chance.randrange(tokens)
        part = chance.choice((k, v))
        if kind == "one bit":
            part.view(torch.int16)[layer, head, token, chance.randrange(channels)] ^= 1 << chance.randrange(7)
            place = token, layer, head
        elif kind == "one token":
            part[:, :, token] = part[:, :, (token + 1) % tokens]
            place = token
        elif kind == "one layer":
            part[layer, :, token:] *= 2
            place = token
        elif kind == "one head":
            part[layer, head, token:] = -part[layer, head, token:]
            place = token, layer, head
        else:  # all digests and every later token are honest, given the changed one
            ids = list(self.ids)
            ids[token] = (ids[token] + 1 + chance.randrange(250)) % 256
            honest = self.store.publish(self.model, ids, producer="contract")
            with self.open(honest.digest) as prefix:
                k, v = self._dense(prefix)
            place = token
        return self.open(self.store.put(self.spec, self.ids, k, v).digest), place

    def _dense(self, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
        return prefix.document.kv(0, DOCUMENT_TOKENS)


@pytest.fixture(scope="module")
def forger(tmp_path_factory: pytest.TempPathFactory) -> Forger:
    return Forger(tmp_path_factory.mktemp("forger"))


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.long)])
def test_audit__the_verdict_finds_every_forgery_and_its_place(forger: Forger, count: int) -> None:
    chance, found = random.Random(11), 0
    for i in range(count):
        prefix, place = forger.forge(KINDS[i % len(KINDS)], chance)
        audit = kvkern.audit(prefix, forger.model)
        first = audit.differences[0] if audit.differences else None
        found += audit.ok is False
        assert first is not None and first.ulps != 0 and audit.differing > 0
        assert place in (first.token, (first.token, first.layer, first.head)), (KINDS[i % len(KINDS)], place, first)
    print(f"\n{found} of {count} forgeries found")
    assert found == count


def test_audit__an_honest_document_passes(forger: Forger) -> None:
    prefix = forger.open(forger.store.publish(forger.model, forger.ids, producer="contract").digest)
    seen: list[tuple[int, int]] = []
    verdict = kvkern.audit(prefix, forger.model, progress=lambda *p: seen.append(p))
    assert (verdict.ok, verdict.is_verdict, verdict.checked, verdict.differing) == (True, True, DOCUMENT_TOKENS, 0)
    assert verdict.miss_probability() == 0 and seen[-1] == (DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    everything = kvkern.audit(prefix, forger.model, DOCUMENT_TOKENS)
    assert (everything.ok, everything.is_verdict, everything.differing) == (True, False, 0)
    assert not [name for name, module in forger.model.named_modules() if "forward" in module.__dict__], "left as it was"


@pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.long)])
def test_audit__the_spot_check_finds_forgeries_at_its_printed_rate(forger: Forger, count: int) -> None:
    """One token changed, everything after it recomputed: the least that a forger needs."""
    chance, tokens, found = random.Random(12), 66, 0
    for i in range(count):
        prefix, place = forger.forge(KINDS[-1], chance)
        audit = kvkern.audit(prefix, forger.model, tokens, seed=i)
        found += not audit.ok
        assert {difference.token for difference in audit.differences} <= {place}, (
            "only the changed token is inconsistent"
        )
    rate = 1 - audit.miss_probability()
    print(f"\n{found} of {count} forgeries found by {tokens} of {DOCUMENT_TOKENS} tokens; printed rate {rate:.0%}")
    assert rate == pytest.approx(tokens / DOCUMENT_TOKENS)
    assert abs(found - count * rate) <= 3 * (count * rate * (1 - rate)) ** 0.5


def test_audit__the_first_token_can_be_checked(forger: Forger) -> None:
    v = forger.v.clone()
    v[0, 0, 0, 0] += 1
    prefix = forger.open(forger.store.put(forger.spec, forger.ids, forger.k, v).digest)
    audit = kvkern.audit(prefix, forger.model, DOCUMENT_TOKENS)
    assert audit.differences[0].token == 0 and audit.differences[0].part == "v"


def test_audit__a_stock_document_gets_a_report_and_no_verdict(tmp_path: Path) -> None:
    subject, store = small_qwen3(), Store(tmp_path / "store")
    prefix = store.open(store.publish(subject.model, subject.doc(1300)).digest, subject.model)
    audit = kvkern.audit(prefix, subject.model)
    assert audit.ok is None and audit.is_verdict and audit.elements == 2 * 1300 * 4 * 2 * 128 * 1


def test_audit__chances_are_those_of_drawing_without_replacement() -> None:
    audit = kvkern.Audit(True, False, tokens=10, checked=4, elements=0, differing=0, differences=())
    assert audit.miss_probability(1) == pytest.approx(6 / 10)
    assert audit.miss_probability(2) == pytest.approx(6 * 5 / (10 * 9))
    assert audit.miss_probability(7) == 0


def test_raises_audit__tokens_out_of_range(forger: Forger) -> None:
    prefix = forger.open(forger.store.publish(forger.model, forger.ids, producer="contract").digest)
    for tokens in (0, -1, DOCUMENT_TOKENS + 1):
        with pytest.raises(kvkern.LayoutError, match=f"from 1 to the document's {DOCUMENT_TOKENS}"):
            kvkern.audit(prefix, forger.model, tokens)
