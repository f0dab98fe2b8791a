"""Whole prompts, further turns, pipeline() and what generate() refuses, on tiny models. Bits are in tests/e2e."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import kvkern
from kvkern import LayoutError, UnsupportedError
from tests.support.bits import differing

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w00 .. w63 are the ids 0 .. 63; id 1 is the word that transformers' stop strings try a tokenizer with."""
    vocab = {word: i for i, word in enumerate(words(range(64)).replace("w01", "abcdef").split())}
    word_level = Tokenizer(models.WordLevel(vocab, unk_token="abcdef"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="abcdef", pad_token="w00")


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i:02d}" for i in ids)


def test_prepare__a_whole_prompt_is_padded_as_a_tokenizer_pads_it(prefix, doc) -> None:
    inputs = prefix.prepare([[5, 6, 7], [8]], whole_prompt=True)
    assert inputs["input_ids"].tolist() == [[*doc, 5, 6, 7], [0, 0, *doc, 8]]
    assert inputs["attention_mask"].tolist() == [[1] * 73, [1] * 70 + [0, 0, 1]]
    assert set(inputs) == {"input_ids", "attention_mask", "past_key_values"}
    padded = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    again = prefix.prepare(padded, attention_mask=padded.ne(0), whole_prompt=True)
    assert torch.equal(again["input_ids"], inputs["input_ids"])


def test_prepare__positions_are_given_only_where_rows_are_padded(prefix, model) -> None:
    uniform, ragged = prefix.prepare([[5, 6], [7, 8]]), prefix.prepare([[5, 6], [8]])
    assert "position_ids" not in uniform and ragged["position_ids"].tolist() == [[70, 71], [70, 70]]
    expected = model(**prefix.prepare([[5, 6], [7, 8]]), position_ids=torch.tensor([[70, 71]] * 2)).logits
    assert differing(model(**uniform).logits, expected) == 0
    model(**ragged)
    more = prefix.prepare([[9], [9]], cache=ragged["past_key_values"])
    assert more["position_ids"].tolist() == [[72], [71]]


@pytest.mark.parametrize("rows", [[[5, 6, 7], [9, 8, 7]], [[5, 6, 7], [8]]], ids=["uniform", "ragged"])
def test_tokens_turns__after_puts_the_last_token_in_front(prefix, model, rows) -> None:
    """Four turns with after= have the tokens of four turns that begin with the last token themselves."""
    new = {}
    for with_after in (False, True):
        cache, last, new[with_after] = None, None, []
        for _ in range(4):
            if with_after or cache is None:
                inputs = prefix.prepare(rows, cache=cache, after=last)
            else:
                begun = [[int(token), *row] for token, row in zip(last[:, -1], rows, strict=True)]
                inputs = prefix.prepare(begun, cache=cache)
            cache, last = inputs["past_key_values"], model.generate(**inputs, **GREEDY)
            new[with_after].append(last[:, -3:].tolist())
            rows = [row[::-1] for row in rows][::-1]
    assert new[True] == new[False]


@pytest.mark.parametrize("rows", [[[5, 6, 7], [9, 8, 7]], [[5, 6, 7], [8]]], ids=["uniform", "ragged"])
def test_tokens_turns__every_turn_goes_on_from_the_last_output(prefix, model, doc, rows) -> None:
    """Four turns, with the question alone and with the whole prompt: the same tokens."""
    new = {}
    for whole in (False, True):
        cache, after, new[whole] = None, None, []
        for _ in range(4):
            inputs = prefix.prepare(rows, cache=cache, after=after, whole_prompt=whole)
            cache, after = inputs["past_key_values"], model.generate(**inputs, **GREEDY)
            new[whole].append(after[:, -3:].tolist())
            rows = [row[::-1] for row in rows][::-1]
    assert new[True] == new[False]
    assert [row[row != 0][:70].tolist() for row in after] == [doc, doc]


def test_tokens_turns__whole_prompts_after_a_reset_and_questions_after_whole_prompts(prefix, model) -> None:
    inputs = prefix.prepare([5, 6], whole_prompt=True)
    cache = inputs["past_key_values"]
    out = model.generate(**inputs, **GREEDY)
    alone = prefix.prepare([7], cache=cache, after=out)
    assert alone["input_ids"].tolist() == [[int(out[0, -1]), 7]]
    model(**alone)
    cache.reset()
    again = prefix.prepare([5, 6], cache=cache, whole_prompt=True)
    assert torch.equal(model.generate(**again, **GREEDY), out)


def test_raises_prepare__a_whole_prompt_of_unknown_tokens(prefix, model) -> None:
    inputs = prefix.prepare([5, 6])
    cache = inputs["past_key_values"]
    out = model.generate(**inputs, **GREEDY)
    for after in (out, None):
        with pytest.raises(LayoutError, match=r"whole_prompt=True, too"):
            prefix.prepare([7], cache=cache, after=after, whole_prompt=True)
    whole = prefix.prepare([5, 6], whole_prompt=True)
    out = model.generate(**whole, **GREEDY)
    with pytest.raises(LayoutError, match="after has 5 tokens, the cache has seen 74"):
        prefix.prepare([7], cache=whole["past_key_values"], after=out[:, 70:], whole_prompt=True)
    with pytest.raises(LayoutError, match=r"whole_prompt=True, too"):
        prefix.prepare([7], cache=whole["past_key_values"], whole_prompt=True)


def test_raises_model__a_whole_prompt_without_generate(prefix, model) -> None:
    inputs = prefix.prepare([5, 6], whole_prompt=True)
    with pytest.raises(UnsupportedError, match=r"given tokens again.*for model\.generate\(\)"):
        model(**inputs)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"use_cache": False}], ids=str)
def test_raises_generate__ways_that_give_the_whole_prompt_again(prefix, model, options) -> None:
    inputs = prefix.prepare([5, 6], whole_prompt=True)
    with pytest.raises(UnsupportedError, match="given tokens again"):
        model.generate(**inputs, **GREEDY, **options)


def test_raises_generate__a_mask_that_is_not_prepares(prefix, model) -> None:
    inputs = prefix.prepare([[5, 6], [7]], whole_prompt=True)
    for begin, value in ((0, 0), (70, 1)):
        mask = inputs["attention_mask"].clone()
        mask[:, begin : begin + 2] = value
        fresh = prefix.prepare([[5, 6], [7]], whole_prompt=True)
        with pytest.raises(UnsupportedError, match="the mask that prepare"):
            model.generate(**{**fresh, "attention_mask": mask}, **GREEDY)


@pytest.mark.parametrize("implementation", ["static", "offloaded_static"])
def test_raises_generate__static_caches(prefix, model, implementation) -> None:
    with pytest.raises(UnsupportedError, match=r"static one.*kvkern\.unpatch"):
        model.generate(torch.tensor([[5, 6]]), **GREEDY, cache_implementation=implementation)
    with pytest.raises(ValueError, match="cache_implementation.*past_key_values"):
        model.generate(**prefix.prepare([5, 6]), **GREEDY, cache_implementation=implementation)


def test_raises_generate_batch__by_name_and_before_another_attention_is_selected(model, doc, monkeypatch) -> None:
    """As on a host with FlashAttention, where transformers would select that."""
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda *_, **__: True)
    kvkern.patch(model)
    ways = (
        lambda: model.generate_batch([doc], max_new_tokens=2),
        lambda: model.generate(torch.tensor([doc]), max_new_tokens=2, cache_implementation="paged"),
        model.init_continuous_batching,
    )
    for way in ways:
        with pytest.raises(UnsupportedError, match=r"generate_batch.*prefix\.prepare\(rows\).*unpatch"):
            way()
    assert model.config._attn_implementation == "kvkern"
    assert "init_continuous_batching" in copy.deepcopy(model).__dict__
    kvkern.unpatch(model)
    assert "init_continuous_batching" not in model.__dict__


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_generate__a_prefill_in_chunks(prefix, model, whole) -> None:
    """transformers counts chunks from the tokens of the cache since 5.21; before, from the first column."""
    expected = model.generate(**prefix.prepare([5, 6, 7, 8, 9], whole_prompt=whole), **GREEDY)
    inputs = prefix.prepare([5, 6, 7, 8, 9], whole_prompt=whole)
    if TRANSFORMERS < (5, 21):
        with pytest.raises(UnsupportedError, match=r"from transformers 5\.21 on"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=2)
    else:
        assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=2), expected)


def test_tokens_generate__stop_strings_with_a_tokenizer(prefix, model, tokenizer) -> None:
    free = model.generate(**prefix.prepare([5, 6], whole_prompt=True), **GREEDY)
    strings = {"stop_strings": [words(free[0, 73:74])], "tokenizer": tokenizer}
    for whole in (True, False):
        stopped = model.generate(**prefix.prepare([5, 6], whole_prompt=whole), **GREEDY, **strings)
        assert torch.equal(stopped, free[:, 0 if whole else 70 : 74])


def test_raises_attention__causal_is_computed_and_nothing_else(model) -> None:
    kvkern.patch(model)
    ids = torch.tensor([[5, 6, 7]])
    assert differing(model(ids, is_causal=True).logits, model(ids).logits) == 0
    with pytest.raises(UnsupportedError, match="causal"):
        model(ids, is_causal=False)
    with pytest.raises(UnsupportedError, match="not causal"):
        _attend(model, is_causal=False)
    _attend(model, output_router_logits=True)


def _attend(model, **options) -> None:
    from kvkern.model_patch.attention import attention_forward

    q, k = (torch.zeros(1, heads, 2, 32, dtype=torch.bfloat16) for heads in (6, 2))
    attention_forward(model.model.layers[0].self_attn, q, k, k, None, **options)


def test_tokens_pipeline__with_and_without_a_prefix(prefix, model, store, doc, tokenizer) -> None:
    """The README's lines: match() compares the very ids that the pipeline will make of the text."""
    text = words([*doc, 5, 6, 7])
    ids = tokenizer(text).input_ids
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    attached = store.match(ids, model)
    assert attached.tokens == 70
    cache = attached.prepare(ids[attached.tokens :])["past_key_values"]
    plain = write(text, **GREEDY)[0]["generated_text"]
    assert write(text, past_key_values=cache, **GREEDY)[0]["generated_text"] == plain
    assert cache.lens.tolist() == [75]
    kvkern.unpatch(model)
    assert write(text, **GREEDY)[0]["generated_text"] == plain
