"""What generate() offers, on an attached prefix: the whole prompt's output and every logit, against stock eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import kvkern
from kvkern.model_patch.load import load_model
from tests.support.bits import differing
from tests.support.models import Subject, stock_cache, subject
from tests.support.stock import needs_stock_order

pytestmark = needs_stock_order

P, T, STEPS = 150, 24, 8  # stock's prefill of at most 1,024 tokens has the same bits in one piece and in two


class Recorder:
    """Keeps the ids that generate() showed it."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []


class ForbidFirstTokens(Recorder, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids.clone())
        return scores.scatter(1, input_ids[:, :P], -1e4)


class StopAtLength(Recorder, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.shown.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] == P + T + 5)


class Streamer(Recorder, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.shown.append(value.clone())

    def end(self) -> None:
        """Nothing is kept back."""


@pytest.fixture
def who() -> Iterator[Subject]:
    """The small model alone, for what depends on transformers more than on the model: a tenth of SmolLM2's time."""
    who = subject("small_qwen3")
    kvkern.unpatch(who.model)
    yield who
    kvkern.unpatch(who.model)


GREEDY = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
IDIOMS: dict[str, Callable[[], dict]] = {
    "greedy": lambda: GREEDY,
    "prefill_chunk_size": lambda: {**GREEDY, "prefill_chunk_size": 7},
    "no_repeat_ngram_size": lambda: {**GREEDY, "no_repeat_ngram_size": 2},
    "repetition_penalty": lambda: {**GREEDY, "repetition_penalty": 1.8},
    "max_length": lambda: {"do_sample": False, "max_length": P + T + STEPS, "min_length": P + T + STEPS},
    "generation_config": lambda: {"generation_config": GenerationConfig(**GREEDY, repetition_penalty=1.5)},
    "bad_words_ids": lambda: {**GREEDY, "bad_words_ids": [[101], [115, 115]]},
    "guidance_scale": lambda: {**GREEDY, "guidance_scale": 1.5},
    "sampling": lambda: {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 1.3, "repetition_penalty": 1.2},
    "return_sequences": lambda: {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "beams": lambda: {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    "beam_sampling": lambda: {**GREEDY, "do_sample": True, "num_beams": 3},
    "logits_processor": lambda: {**GREEDY, "logits_processor": [ForbidFirstTokens()]},
    "stopping_criteria": lambda: {"do_sample": False, "max_new_tokens": STEPS, "stopping_criteria": [StopAtLength()]},
    "streamer": lambda: {**GREEDY, "streamer": Streamer()},
}


def generate(who: Subject, options: dict, **inputs):
    torch.manual_seed(11)
    return who.model.generate(**inputs, **options, output_logits=True, output_scores=True, return_dict_in_generate=True)


def assert_same(own, stock) -> None:
    assert torch.equal(own.sequences, stock.sequences)
    assert len(own.scores) == len(stock.scores)
    for kind in ("scores", "logits"):
        for a, b in zip(getattr(own, kind), getattr(stock, kind), strict=True):
            assert differing(a, b) == 0, kind


def shown(options: dict) -> list[torch.Tensor]:
    given = [options.get("streamer"), *options.get("logits_processor", []), *options.get("stopping_criteria", [])]
    return [ids for recorder in given if recorder for ids in recorder.shown]


@pytest.mark.parametrize("idiom", IDIOMS)
def test_bits_whole_prompt__generate_equals_stock_from_nothing(who, attach, idiom: str) -> None:
    doc, question = who.doc(P), who.question(T)
    ids = torch.tensor([doc + question])
    theirs, ours = IDIOMS[idiom](), IDIOMS[idiom]()
    stock = generate(who, theirs, input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs = attach(who, doc).prepare(question, whole_prompt=True)
    assert torch.equal(inputs["input_ids"], ids)
    own = generate(who, ours, **inputs)
    assert_same(own, stock)
    assert own.past_key_values is inputs["past_key_values"]
    for a, b in zip(shown(ours), shown(theirs), strict=True):
        assert torch.equal(a, b)


def test_tokens_penalties__without_the_document_they_do_not_see_it(who, attach) -> None:
    """The twin: these very inputs tell a whole prompt from a question alone."""
    doc, question = who.doc(P), who.question(T)
    prefix = attach(who, doc)
    for idiom in ("no_repeat_ngram_size", "repetition_penalty", "sampling", "beams", "logits_processor"):
        whole = generate(who, IDIOMS[idiom](), **prefix.prepare(question, whole_prompt=True))
        alone = generate(who, IDIOMS[idiom](), **prefix.prepare(question))
        same = [differing(a, b) == 0 for a, b in zip(whole.scores, alone.scores, strict=False)]
        assert not all(same), idiom


@pytest.mark.parametrize("idiom", ["greedy", "no_repeat_ngram_size", "prefill_chunk_size"])
def test_bits_whole_prompt__ragged_rows_equal_unpadded_copies(who, attach, idiom: str) -> None:
    doc, questions = who.doc(P), [who.question(n) for n in (3, 24, 10)]
    stock = []
    for question in questions:
        ids = torch.tensor([doc + question] * 3)
        stock.append(generate(who, IDIOMS[idiom](), input_ids=ids, attention_mask=torch.ones_like(ids)))
    own = generate(who, IDIOMS[idiom](), **attach(who, doc).prepare(questions, whole_prompt=True))
    for row, expected in enumerate(stock):
        assert torch.equal(own.sequences[row, 24 - len(questions[row]) :], expected.sequences[0])
        for a, b in zip(own.logits, expected.logits, strict=True):
            assert differing(a[row], b[0]) == 0


def test_bits_whole_prompt__three_turns(who, attach) -> None:
    doc, turns = who.doc(P), [who.question(n, n) for n in (10, 15, 12)]
    options = {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    stock, cache, ids = [], stock_cache(who.model, doc), torch.tensor([doc])
    for question in turns:
        ids = torch.cat([ids, torch.tensor([question])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        stock.append(generate(who, options, **inputs))
        ids = stock[-1].sequences
    prefix, cache, after = attach(who, doc), None, None
    for question, expected in zip(turns, stock, strict=True):
        inputs = prefix.prepare(question, cache=cache, after=after, whole_prompt=True)
        own = generate(who, options, **inputs)
        assert_same(own, expected)
        cache, after = inputs["past_key_values"], own.sequences


@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": True}],
    ids=lambda options: next(iter(options)),
)
def test_bits_suffix__generate_equals_stock_on_a_filled_cache(who, attach, options: dict) -> None:
    doc, question = who.doc(P), who.question(T)
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(who.model)}
    options = {**GREEDY, "min_new_tokens": None, **options}
    inputs = {"input_ids": torch.tensor([question]), "attention_mask": torch.ones(1, P + T, dtype=torch.long)}
    stock = generate(who, options, **inputs, past_key_values=stock_cache(who.model, doc))
    assert_same(generate(who, options, **attach(who, doc).prepare(question)), stock)


def test_bits_embeds__whole_prompt_as_embeddings(who, attach) -> None:
    doc, question = who.doc(P), who.question(T)
    embeds = who.model.get_input_embeddings()(torch.tensor([doc + question])).detach()
    stock = generate(who, GREEDY, inputs_embeds=embeds, attention_mask=torch.ones(1, P + T, dtype=torch.long))
    inputs = attach(who, doc).prepare(question, whole_prompt=True)
    del inputs["input_ids"]
    assert_same(generate(who, GREEDY, **inputs, inputs_embeds=embeds), stock)


def test_bits_stop_strings__smollm2_stops_where_stock_does(attach) -> None:
    smollm2, (_, tokenizer) = subject("smollm2"), load_model("smollm2")
    kvkern.unpatch(smollm2.model)
    doc, question = smollm2.doc(P), smollm2.question(T)
    ids = torch.tensor([doc + question])
    options = {"do_sample": False, "max_new_tokens": STEPS, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    free = generate(smollm2, options, input_ids=ids, attention_mask=torch.ones_like(ids))
    word = tokenizer.decode(free.sequences[0, P + T + 3])
    options |= {"stop_strings": [word], "tokenizer": tokenizer}
    stock = generate(smollm2, options, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert P + T < stock.sequences.shape[1] < free.sequences.shape[1]
    try:
        inputs = attach(smollm2, doc).prepare(question, whole_prompt=True)
        assert_same(generate(smollm2, options, **inputs), stock)
    finally:
        kvkern.unpatch(smollm2.model)
