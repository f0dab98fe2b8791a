"""publish computes with eager's bits whatever the model attends by, and leaves the model as it is."""

from __future__ import annotations

import threading

import pytest
import torch

import kvkern
from kvkern import UnsupportedError
from kvkern.model_patch.attending import attending_by
from kvkern.model_patch.computing import prefill
from tests.model_patch.conftest import SIZES, tiny
from tests.support.bits import differing
from tests.support.models import stock_cache
from tests.support.stock import needs_stock_order


@needs_stock_order
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_bits_publish__a_model_of_sdpa_has_eagers_bits(kind: str, store: kvkern.Store, doc: list[int]) -> None:
    """The first snippet: a model as from_pretrained gives it. Its own attention gives other bits."""
    model = tiny(kind)
    cache = stock_cache(model, doc)
    eager = [torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values")]
    model.set_attn_implementation("sdpa")
    forward_before = dict(vars(model))
    prefix = store.open(store.publish(model, doc).digest, model)
    assert prefix.spec.producer_info["attn_implementation"] == "kvkern"
    assert model.config._attn_implementation == "sdpa" and vars(model) == forward_before
    assert all(differing(a, b) == 0 for a, b in zip(prefix.document.kv(), eager, strict=True))
    as_it_is = store.publish(model, doc, attention="model")
    assert as_it_is.digest != prefix.digest
    sdpa = store.open(as_it_is.digest, model)
    assert sdpa.spec.producer_info["attn_implementation"] == "sdpa"
    assert any(differing(a, b) for a, b in zip(sdpa.document.kv(), eager, strict=True))


def test_publish__patched_and_unpatched_share_a_digest(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("qwen3")
    model.set_attn_implementation("sdpa")
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    assert store.publish(model, doc).digest == store.publish(model, doc, attention="model").digest == digest


def test_bits_attending_by__threads_go_on_with_the_model_meanwhile(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([doc])
    with torch.inference_mode():
        expected = model(ids).logits
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            with torch.inference_mode():
                wrong.append(differing(model(ids).logits, expected))

    thread = threading.Thread(target=read)
    thread.start()
    digests = {store.publish(model, doc).digest for _ in range(8)}
    stop.set()
    thread.join()
    assert len(digests) == 1 and sum(wrong) == 0 and len(wrong) > 0


def test_attending_by__shares_every_weight_and_touches_nothing(doc: list[int]) -> None:
    model = tiny("qwen3")
    twin = attending_by(model, "sdpa")
    assert twin is not model and attending_by(model, "eager") is not model
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert twin.config is not model.config and model.config._attn_implementation == "eager"
    configs = {id(m.config) for m in twin.modules() if hasattr(m, "config")}
    assert configs == {id(twin.config)}
    tiny_sdpa = tiny("qwen3")
    tiny_sdpa.set_attn_implementation("sdpa")
    ids = torch.tensor([doc])
    assert all(differing(a, b) == 0 for a, b in zip(prefill(twin, ids), prefill(tiny_sdpa, ids), strict=True))


def test_raises_publish__attention(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("qwen3")
    with pytest.raises(UnsupportedError, match="attention is 'eager': take 'exact' or 'model'"):
        store.publish(model, doc, attention="eager")
    with pytest.raises(UnsupportedError, match="attention='model' goes with producer 'stock'"):
        store.publish(model, doc, producer="contract", attention="model")


def test_raises_publish__an_attention_function_of_somebody_else(store: kvkern.Store, doc: list[int]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mine(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = tiny("qwen3")
    model.set_attn_implementation("mine")
    with pytest.raises(UnsupportedError, match=r"'mine' is a function of .*test_publish_attention"):
        store.publish(model, doc, attention="model")
    assert store.publish(model, doc).tokens == len(doc)  # kvkern's attention is known


def test_publish__a_family_whose_eager_is_another_says_to_take_the_model_as_it_is(store: kvkern.Store) -> None:
    """GPT-2 takes its softmax in bf16; its own document is judged by distance, never by stock eager's bits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ids = torch.randint(2, 64, (150,)).tolist()
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel.*softmax in bfloat16.*attention='model'"):
        store.publish(model, ids)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        digest = store.publish(model, ids, attention="model").digest
        prefix = store.open(digest, model, check="recompute")
        assert prefix.spec.producer_info["attn_implementation"] == attention
        assert prefix.recomputed.rule == "distance"


def test_raises_generate__a_model_that_changes_its_values_after_the_cache(store: kvkern.Store) -> None:
    """DiffLlama cuts them: it has no use for tiles, and is told so by name. Without a prefix it runs, and equal."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    torch.manual_seed(3)
    config = DiffLlamaConfig(**SIZES)
    model = DiffLlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    digest = store.publish(model, list(range(2, 62)) * 2).digest
    prefix = store.open(digest, model, check="recompute")
    assert prefix.recomputed.rule == "distance"
    kvkern.patch(model)
    with pytest.raises(UnsupportedError, match="DiffLlamaAttention changes its values after the cache"):
        model.generate(**prefix.prepare([5, 6]), max_new_tokens=2)


@pytest.mark.parametrize("family", ["gemma", "bert"])
def test_as_configured__buffers_of_other_dtypes_and_integers(family: str) -> None:
    from kvkern.model_patch.as_configured import unnamed_change
    from tests.support import families

    assert unnamed_change(families.build(family)) is None


def test_raises_prepare__padded_rows_where_positions_are_counted_from_the_padding_id(store: kvkern.Store) -> None:
    from tests.support import families

    model = families.build("roberta", is_decoder=True)
    ids = torch.randint(3, 100, (70,)).tolist()
    digest = store.publish(model, ids, attention="model").digest
    expected = model(torch.tensor([[5, 6, 7]]), past_key_values=stock_cache(model, ids)).logits
    kvkern.patch(model, allow_other_bits=True)
    prefix = store.open(digest, model)
    assert (model(**prefix.prepare([5, 6, 7])).logits - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(UnsupportedError, match="counts positions from its padding id"):
        prefix.prepare([[5, 6, 7], [8]])
