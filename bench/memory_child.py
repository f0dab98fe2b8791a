"""Run in a process of its own: the memory of readers of one document, under kvkern or stock, as one JSON line."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from typing import TYPE_CHECKING, Any

import psutil
import torch

import kvkern
from bench.documents import QUESTION_TOKENS, attend_with, stock_cache
from kvkern.model_patch.identity import spec_of
from tests.support.models import smollm2

if TYPE_CHECKING:
    from kvkern import Prefix

READERS = 8


def main(way: str, root: str, digest: str) -> dict[str, Any]:
    """Measure after loading, after opening, after the first question of one reader, and of eight.

    Args:
        way: `kvkern`, or the stock attention that reads a DynamicCache.
        root: the store.
        digest: the document.
    """
    subject = smollm2()
    model, question = subject.model, subject.question(QUESTION_TOKENS)
    attend_with(model, way)
    _ask(model, {"input_ids": torch.tensor([question] * READERS)})
    spec_of(model)
    memory = {"loaded": _resident()}
    prefix = kvkern.Store(root).open(digest, model)
    stock = None if way == "kvkern" else stock_cache(prefix)
    info = {"prefix_bytes": prefix.spec.bytes_per_token * prefix.tokens, "prefix_tokens": prefix.tokens}
    if stock is not None:
        prefix = None
    memory["opened"] = _resident()
    for readers in (1, READERS):
        held = _asked(model, [question] * readers, prefix, stock)
        memory[f"readers_{readers}"] = _resident()
        del held
    return {"memory": memory, **info}


def _asked(model: Any, questions: list[list[int]], prefix: Prefix | None, stock: Any) -> Any:
    """Let readers ask; return the cache that they hold."""
    if stock is None:
        inputs = prefix.prepare(torch.tensor(questions))
    else:
        # One reader takes the document's cache itself; stock gives each of eight a copy, and keeps the first.
        cache = stock if len(questions) == 1 else _repeated(stock, len(questions))
        columns = stock.get_seq_length() + len(questions[0])
        inputs = {
            "input_ids": torch.tensor(questions),
            "attention_mask": torch.ones(len(questions), columns, dtype=torch.int64),
            "past_key_values": cache,
        }
    _ask(model, inputs)
    if stock is not None and len(questions) == 1:
        stock.crop(-len(questions[0]))
    return inputs["past_key_values"]


def _repeated(cache: Any, readers: int) -> Any:
    cache.batch_repeat_interleave(readers)
    return cache


def _ask(model: Any, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)


def _resident() -> dict[str, int]:
    """Return resident bytes once everything free has gone back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    full = psutil.Process().memory_full_info()
    return {"rss_bytes": full.rss, "uss_bytes": full.uss, "shared_bytes": full.shared}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])))
