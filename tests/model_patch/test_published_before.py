"""Documents that an earlier version published open with the same names, and are published again under them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM

import kvkern
from kvkern.model_patch import identity
from kvkern.model_patch.identity import spec_of
from tests.support.models import SMALL_QWEN3
from tests.support.stock import needs_stock_order

STORE = Path(__file__).parents[1] / "support" / "published_0_1"
IDS = list(b"Any fool can write code that a computer can understand; good programmers")[:40]
DIGESTS = {
    "eager": "12ee623fe25bf825be176f082f8f0c01149b15189508afd6b4ff337255a89d73",
    "patched": "760a82fd13d2864c2b8cebff00c94be320247bbc7b990ef07642dc5acb3fd32d",
    "contract": "579f5b584af74e8c8b9bdac66099008fbe416cd0a88890935f09c9f93655626d",
    "sdpa": "a30bfe6878c896283bb5fd67fcf328da2b9192d155781ce237483bbf8e172ba1",
    "scope_model": "7426e9ab7f8967fad01c5696f97ac061fc5847afe3e3401ee74b0e65586882c8",
}
SPEC_DIGEST_OF_CONTRACT = "d45c8c263e2963365abb45ea7a89c1b5de40a8c4a6d4daa990bcb7439f78ddb3"


@pytest.fixture
def store(tmp_path: Path) -> kvkern.Store:
    return kvkern.Store(shutil.copytree(STORE, tmp_path / "store"))


@pytest.fixture(autouse=True)
def host_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a spec says of the host: that of the host which published."""
    info = identity._stock_info

    def of_then(model: PreTrainedModel, attn_implementation: str | None) -> dict[str, object]:
        return {**info(model, attn_implementation), "device": "avx512_bf16", "torch": "2.13.0+cpu"}

    monkeypatch.setattr(identity, "_stock_info", of_then)


def small(attention: str = "eager") -> PreTrainedModel:
    return Qwen3ForCausalLM.from_pretrained(SMALL_QWEN3, dtype=torch.bfloat16, attn_implementation=attention).eval()


@pytest.mark.parametrize("made_by", DIGESTS)
def test_open__a_document_of_before(made_by: str, store: kvkern.Store) -> None:
    model = small()
    prefix = store.open(DIGESTS[made_by], model)
    assert prefix.token_ids.tolist() == IDS
    kvkern.patch(model)
    assert model.generate(**prefix.prepare([32, 119]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    assert store.verify().ok


@needs_stock_order  # another mathematical library may make another RoPE table, whose digest is in this spec
def test_spec__of_a_model_without_adapters_is_that_of_before() -> None:
    """Held without running the model."""
    assert spec_of(small(), producer="contract").digest == SPEC_DIGEST_OF_CONTRACT


@needs_stock_order
@pytest.mark.parametrize("made_by", ["eager", "patched", "contract", "scope_model"])
def test_bits_publish__the_same_document_again(made_by: str, store: kvkern.Store) -> None:
    model = small()
    if made_by in ("patched", "scope_model"):
        kvkern.patch(model, scope="model" if made_by == "scope_model" else "attention")
    arguments = {"producer": "contract"} if made_by == "contract" else {}
    done = store.publish(model, IDS, **arguments)
    assert done.digest == DIGESTS[made_by] and done.blocks_new == 0


def test_publish__sdpa_as_it_is_keeps_its_spec(store: kvkern.Store) -> None:
    """Its bits are this host's; the spec is that of before."""
    done = store.publish(small("sdpa"), IDS, attention="model")
    of = store.blocks.manifest
    assert of(done.digest).spec.digest == of(DIGESTS["sdpa"]).spec.digest
