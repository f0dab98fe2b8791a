"""Ask questions about an attached document: one batch, greedily, every question a reader of the same blocks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from kvkern.model_patch.store import Prefix

QUESTION = "\n\nQuestion: {question}\nAnswer:"
"""What a question becomes when it is appended to a document."""


@dataclass(frozen=True)
class Answers:
    """What one batch of readers said.

    Attributes:
        texts: one answer per question.
        new_tokens: tokens of each answer, its end-of-text token included.
        seconds: time of the batch, reading the questions included.
    """

    texts: tuple[str, ...]
    new_tokens: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all readers per second."""
        return sum(self.new_tokens) / self.seconds


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a document: what the tokenizer makes of it, less an end-of-text token, since more follows."""
    ids = list(tokenizer(text).input_ids)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def ask(
    prefix: Prefix,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    template: str = QUESTION,
) -> Answers:
    """Answer questions greedily: one batch, every question a reader of the same attached document.

    Args:
        prefix: the document, opened for a patched model.
        tokenizer: the model's.
        questions: one or more.
        max_new_tokens: length of the longest answer.
        template: text around `{question}`.

    Returns:
        The answers.

    Raises:
        UnsupportedError: a question has no tokens.
    """
    inputs = prefix.prepare(question_rows(tokenizer, questions, template))
    start = time.perf_counter()
    out = prefix.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    ends = {tokenizer.eos_token_id, *_ids_of(prefix.model.generation_config.eos_token_id)}
    rows = [_until(row.tolist(), ends) for row in out[:, inputs["input_ids"].shape[1] :]]
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
    return Answers(texts, tuple(map(len, rows)), seconds)


def question_rows(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], template: str) -> list[list[int]]:
    """Tokenise without special tokens: a question goes on from the document."""
    texts = [template.replace("{question}", question) for question in questions]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def _ids_of(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _until(ids: list[int], ends: set[int | None]) -> list[int]:
    """Cut behind the first end-of-text token: the rest of the row is padding."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
