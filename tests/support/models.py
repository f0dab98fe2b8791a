"""The models of the tests: real pretrained weights, a small trained Qwen3, and Qwen3-4B's widths at random."""

from __future__ import annotations

import functools
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from kvkern.model_patch.load import load_model

SMALL_QWEN3 = Path(__file__).parent / "small_qwen3"


@dataclass(frozen=True)
class Subject:
    """A model, a document that it can read, and questions about it, all as token ids."""

    name: str
    model: PreTrainedModel
    document: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]

    def doc(self, tokens: int) -> list[int]:
        assert tokens <= len(self.document)
        return list(self.document[:tokens])

    def question(self, tokens: int, which: int = 0) -> list[int]:
        """A question of exactly `tokens` tokens."""
        ids = self.questions[which % len(self.questions)]
        return list((ids * (tokens // len(ids) + 1))[:tokens])


def text() -> str:
    """Python's own reference manual: a real document that every installation has."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


QUESTIONS = (
    "\n\nQuestion: What does an assert statement do, and when is it removed?\nAnswer:",
    "\n\nQuestion: Which names does an assignment bind?\nAnswer:",
    "\n\nThe most important rule in this chapter is that",
)


@functools.cache
def smollm2() -> Subject:
    model, tokenizer = load_model("smollm2")
    encode = lambda s: tuple(tokenizer(s).input_ids)  # noqa: E731
    return Subject("smollm2", model, encode(text()[:40_000]), tuple(map(encode, QUESTIONS)))


@functools.cache
def small_qwen3() -> Subject:
    model = Qwen3ForCausalLM.from_pretrained(SMALL_QWEN3, dtype=torch.bfloat16, attn_implementation="eager").eval()
    encode = lambda s: tuple(s.encode())  # noqa: E731
    return Subject("small_qwen3", model, encode(text()[:8_000]), tuple(map(encode, QUESTIONS)))


def qwen3_4b_widths(layers: int = 2) -> PreTrainedModel:
    """Qwen3-4B's real widths with random weights and a small vocabulary."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, max_position_embeddings=40960,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval()


def subject(name: str) -> Subject:
    return {"smollm2": smollm2, "small_qwen3": small_qwen3}[name]()


def stock_cache(model: PreTrainedModel, doc: list[int], batch: int = 1) -> DynamicCache:
    """The document's KV as stock eager makes it in one prefill, repeated to `batch` rows."""
    assert model.config._attn_implementation == "eager"
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([doc]), past_key_values=cache, logits_to_keep=1)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


def greedy(model: PreTrainedModel, steps: int, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate greedily; return logits `[B, steps, vocab]` and the new tokens `[B, steps]`."""
    width = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1), out.sequences[:, width:]


def greedy_stock(model: PreTrainedModel, cache: DynamicCache, doc: list[int], questions: list[list[int]], steps: int):
    """Stock generate over a stock cache of the document; the questions have one length."""
    ids = torch.tensor([doc + question for question in questions])
    return greedy(model, steps, input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
