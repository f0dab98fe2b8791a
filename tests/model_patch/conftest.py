"""A tiny random model of each architecture, a published document of 70 tokens, and a patched reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import kvkern
from kvkern.model_patch import rope
from kvkern.model_patch.store import Prefix, Store
from kvkern.probe import Probe
from tests.support.interpreter import lean_interpreter

SIZES = {
    "vocab_size": 64, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def tiny(kind: str = "qwen3", **changes) -> PreTrainedModel:
    """A random model; the same weights for the same arguments."""
    torch.manual_seed(7)
    config_class, model_class = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        kind
    ]
    config = config_class(**{**SIZES, **changes})
    return model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


@pytest.fixture(scope="session", autouse=True)
def lean() -> Iterator[None]:
    with lean_interpreter():
        yield


@pytest.fixture
def trusted_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust RoPE tables that a host of another order has made: nobody has listed those of tiny models."""
    monkeypatch.setattr(rope, "stock_order", lambda: Probe(True, "taken for granted by this test"))


@pytest.fixture(params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def doc() -> list[int]:
    return torch.randint(2, 64, (70,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return kvkern.Store(tmp_path / "store")


@pytest.fixture
def prefix(model: PreTrainedModel, store: Store, doc: list[int]) -> Iterator[Prefix]:
    """The document, published by stock and opened for the patched model."""
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    with store.open(digest, model) as opened:
        yield opened
