"""What commands load: text, models, tokenizers."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import kvkern
from kvkern.cli.view import working
from kvkern.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Attention(StrEnum):
    """What attends during a publishing prefill."""

    kvkern = "kvkern"
    eager = "eager"
    sdpa = "sdpa"


class Check(StrEnum):
    """What opening a document for a model checks."""

    spec = "spec"
    recompute = "recompute"


class Producer(StrEnum):
    """How KV is computed."""

    stock = "stock"
    contract = "contract"


def read_text(file: str) -> str:
    """Read UTF-8 text from a file, or from stdin when it is called `-`."""
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LayoutError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def quiet_transformers() -> None:
    """Let transformers say errors only."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load(name: str, attention: Attention) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, patched when kvkern is to attend."""
    quiet_transformers()
    from kvkern.model_patch.load import load_model

    is_ours = attention is Attention.kvkern
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, attn_implementation="eager" if is_ours else str(attention))
    if is_ours:
        kvkern.patch(model)
    return model, tokenizer
