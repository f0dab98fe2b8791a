"""Published, attached and continued, against stock eager called with the same chunks: logits by bits."""

from __future__ import annotations

import pytest
import torch

import kvkern
from tests.support.bits import differing, sha256
from tests.support.models import greedy, greedy_stock, stock_cache
from tests.support.stock import needs_stock_order

pytestmark = needs_stock_order

LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("doc_tokens", "steps"),
    [
        pytest.param(300, 12, id="P300-S12"),
        pytest.param(1100, 6, id="P1100-S6"),
        pytest.param(900, 256, id="P900-S256", marks=LONG),
        pytest.param(3774, 64, id="P3774-S64", marks=LONG),
    ],
)
def test_bits_generate__question_in_one_chunk_then_greedy(who, attach, doc_tokens: int, steps: int) -> None:
    doc, question = who.doc(doc_tokens), who.question(24)
    expected, tokens = greedy_stock(who.model, stock_cache(who.model, doc), doc, [question], steps)
    prefix = attach(who, doc)
    logits, own_tokens = greedy(who.model, steps, **prefix.prepare(question))
    print(f"{who.name} P{doc_tokens} S{steps}: logits sha256 {sha256(logits)}, stock {sha256(expected)}")
    assert sha256(logits) == sha256(expected)
    assert torch.equal(tokens, own_tokens)


@pytest.mark.parametrize("doc_tokens", [300, 1100])
def test_bits_store__kv_read_back_is_what_stock_computed(who, attach, doc_tokens: int) -> None:
    doc = who.doc(doc_tokens)
    cache = stock_cache(who.model, doc)
    document = attach(who, doc).document
    k, v = document.kv()
    for layer, (own_k, own_v) in enumerate(zip(k, v, strict=True)):
        assert differing(own_k, cache.layers[layer].keys[0]) == 0
        assert differing(own_v, cache.layers[layer].values[0]) == 0


@pytest.mark.parametrize("attention", ["kvkern", "eager", "sdpa"])
def test_bits_publish__every_model_publishes_stock_eagers_kv(who, attach, tmp_path, attention: str) -> None:
    """Patched, loaded with eager, and as from_pretrained gives it: one document's KV."""
    doc = who.doc(1100)
    stock = attach(who, doc).document
    if attention != "kvkern":
        kvkern.unpatch(who.model)
        who.model.set_attn_implementation(attention)
    store = kvkern.Store(tmp_path / "store")
    done = store.publish(who.model, doc)
    assert who.model.config._attn_implementation == attention
    who.model.set_attn_implementation("eager")
    own = store.open(done.digest, who.model).document
    for a, b in zip(stock.shards, own.shards, strict=True):
        assert differing(a.k, b.k) == 0 and differing(a.v, b.v) == 0


def test_bits_batch__equal_length_questions(who, attach) -> None:
    doc, questions = who.doc(1010), [who.question(20, which) for which in range(3)]
    expected, _ = greedy_stock(who.model, stock_cache(who.model, doc, batch=3), doc, questions, steps=8)
    logits, _ = greedy(who.model, 8, **attach(who, doc).prepare(questions))
    assert sha256(logits) == sha256(expected)


@pytest.mark.parametrize("doc_tokens", [300, 1010])
def test_bits_batch__ragged_rows_equal_unpadded_copies(who, attach, doc_tokens: int) -> None:
    doc, questions = who.doc(doc_tokens), [who.question(n) for n in (1, 2, 24)]
    expected = []
    for question in questions:
        cache = stock_cache(who.model, doc, batch=3)
        expected.append(greedy_stock(who.model, cache, doc, [question] * 3, steps=6)[0][0])
    logits, _ = greedy(who.model, 6, **attach(who, doc).prepare(questions))
    for row in range(3):
        assert sha256(logits[row]) == sha256(expected[row]), f"question of {len(questions[row])} tokens"


def test_bits_batch__a_plain_forward_needs_no_generate(who, attach) -> None:
    doc, question = who.doc(300), who.question(24)
    ids = torch.tensor([question])
    with torch.inference_mode():
        expected = who.model(input_ids=ids, past_key_values=stock_cache(who.model, doc)).logits
        logits = who.model(**attach(who, doc).prepare(question)).logits
    assert differing(logits, expected) == 0


def test_tokens_beams__equal_stock_with_a_repeated_cache(who, attach) -> None:
    doc, question = who.doc(300), who.question(24)
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, "do_sample": False}
    ids = torch.tensor([doc + question])
    cache = stock_cache(who.model, doc, batch=4)
    expected = who.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    prefix = attach(who, doc)
    out = who.model.generate(**prefix.prepare(question), **options)
    assert torch.equal(out[:, 24:], expected[:, 324:])


def test_bits_turns__a_second_turn_on_a_live_cache(who, attach) -> None:
    doc, question, more = who.doc(1010), who.question(10), who.question(15, 1)
    cache = stock_cache(who.model, doc)
    _, tokens = greedy_stock(who.model, cache, doc, [question], steps=5)
    expected, _ = greedy_stock(who.model, cache, doc + question + tokens[0].tolist(), [more], steps=5)
    prefix = attach(who, doc)
    inputs = prefix.prepare(question)
    first = who.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    again = prefix.prepare(more, cache=inputs["past_key_values"], after=first)
    logits, _ = greedy(who.model, 5, **again)
    assert sha256(logits) == sha256(expected)


def test_bits_turns__crop_forgets_the_last_tokens(who, attach) -> None:
    prefix = attach(who, who.doc(300))
    inputs = prefix.prepare(who.question(24))
    cache = inputs["past_key_values"]
    with torch.inference_mode():
        expected = who.model(**inputs).logits
        cache.crop(-20)
        logits = who.model(**prefix.prepare(who.question(24)[4:], cache=cache)).logits
    assert differing(logits, expected[:, 4:]) == 0


def test_bits_plain_cache__a_patched_model_is_exact_without_a_prefix(who) -> None:
    ids = torch.tensor([who.doc(1040)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, _ = greedy(who.model, 4, **inputs)
    kvkern.patch(who.model)
    logits, _ = greedy(who.model, 4, **inputs)
    assert sha256(logits) == sha256(expected)


def test_bits_plain_cache__padding_never_enters_a_sum(who) -> None:
    rows = [who.doc(n) for n in (40, 17, 29)]
    kvkern.patch(who.model)
    whole = [torch.ones(3, len(row), dtype=torch.long) for row in rows]
    expected = [
        greedy(who.model, 3, input_ids=torch.tensor([row] * 3), attention_mask=mask)[0][0]
        for row, mask in zip(rows, whole, strict=True)
    ]
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 40 - len(row) :], mask[b, 40 - len(row) :] = torch.tensor(row), 1
    logits, _ = greedy(who.model, 3, input_ids=ids, attention_mask=mask)
    assert [sha256(row) for row in logits] == [sha256(row) for row in expected]


def test_bits_widths__qwen3_4b_layers() -> None:
    from tests.support.models import qwen3_4b_widths

    model = qwen3_4b_widths(layers=2)
    ids = torch.randint(0, 512, (1, 700), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, _ = greedy(model, 3, **inputs)
    kvkern.patch(model)
    logits, _ = greedy(model, 3, **inputs)
    assert sha256(logits) == sha256(expected)


def test_publish__a_shared_beginning_is_stored_once_and_threads_do_not_change_the_digest(who, tmp_path) -> None:
    """Stock's KV of a token is the same in every prefill of at most 1,024 tokens."""
    store, before = kvkern.Store(tmp_path / "store"), torch.get_num_threads()
    doc = who.doc(1024)
    assert store.publish(who.model, doc[:700]).blocks_new == 3
    done = store.publish(who.model, doc)
    assert (done.blocks_new, done.blocks_reused) == (2, 2)
    torch.set_num_threads(1)
    try:
        again = kvkern.Store(tmp_path / "empty").publish(who.model, doc)
    finally:
        torch.set_num_threads(before)
    assert again.digest == done.digest
