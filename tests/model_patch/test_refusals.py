"""What kvkern does not compute is refused by name, never computed wrongly."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

import kvkern
from kvkern import LayoutError, SpecMismatchError, UnsupportedError
from kvkern.kernels import triton_door
from tests.model_patch.conftest import SIZES, tiny


def test_raises_unpatched__a_prefix_cache_under_stock_attention(prefix, model) -> None:
    inputs = prefix.prepare([5, 6])
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(UnsupportedError, match=rf"{implementation}.*not patched.*kvkern\.patch"):
            model(**inputs)


def test_raises_foreign_model__a_cache_meets_another_model(prefix, model) -> None:
    other = copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match="another model object"):
        other(**prefix.prepare([5, 6]))
    kvkern.unpatch(other)
    with pytest.raises(Exception):  # noqa: B017 an unpatched stranger must fail on the handle, in whatever words
        other(**prefix.prepare([5, 6]))


def test_raises_model__sliding_layers() -> None:
    windowed = tiny("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        kvkern.patch(windowed)


def test_raises_model__softcap() -> None:
    config = Gemma2Config(**{**SIZES, "eos_token_id": 2}, sliding_window=None, layer_types=["full_attention"] * 2)
    capped = Gemma2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="softcap"):
        kvkern.patch(capped)


def test_raises_model__dtype(model) -> None:
    with pytest.raises(UnsupportedError, match=r"float32.*bfloat16"):
        kvkern.patch(model.float())


def test_raises_patch__profile_and_scope(model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="'quick'"):
        kvkern.patch(model, profile="quick")
    with pytest.raises(UnsupportedError, match="scope 'model'"):
        kvkern.patch(model, profile="fast", scope="model")
    with monkeypatch.context() as patch:
        patch.setattr(triton_door, "is_interpreted", lambda: False)
        with pytest.raises(UnsupportedError, match="'fast' computes with a GPU's tensor cores"):
            kvkern.patch(model, profile="fast")
    with pytest.raises(UnsupportedError, match="'everything'"):
        kvkern.patch(model, scope="everything")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("softcap", 30.0),
        ("s_aux", torch.ones(6)),
        ("sliding_window", 64),
        ("output_attentions", True),
        ("head_mask", torch.ones(6)),
    ],
)
def test_raises_attention__an_argument_that_would_change_the_result(model, name, given) -> None:
    from kvkern.model_patch.attention import attention_forward

    q = torch.zeros(1, 6, 2, 32, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=name):
        attention_forward(model.model.layers[0].self_attn, q, k, k, None, **{name: given})


def test_raises_attention__dropout_and_value_width(model) -> None:
    from kvkern.model_patch.attention import attention_forward

    module = model.model.layers[0].self_attn
    q = torch.zeros(1, 6, 2, 32, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="dropout"):
        attention_forward(module, q, k, k, None, dropout=0.1)
    with pytest.raises(UnsupportedError, match="head_dim 16"):
        attention_forward(module, q, k, k[..., :16], None)
    with pytest.raises(UnsupportedError, match="float32"):
        attention_forward(module, q.float(), k, k, None)


def test_raises_output_attentions__not_returned(prefix, model) -> None:
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**prefix.prepare([5, 6]), output_attentions=True)


def test_raises_cache__value_head_dim_differs(prefix) -> None:
    cache = prefix.prepare([5, 6])["past_key_values"]
    k = torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="one head_dim"):
        cache.update(k, k[..., :16], 0)


def test_raises_mask__foreign_4d(model, prefix) -> None:
    inputs = prefix.prepare([5, 6])
    inputs["attention_mask"] = torch.zeros(1, 1, 2, 72, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="4D attention mask"):
        model(**inputs)


def test_raises_mask__foreign_function() -> None:
    from kvkern.model_patch.masks import padding_mask

    with pytest.raises(UnsupportedError, match="mask function"):
        padding_mask(1, 2, 2, mask_function=lambda *_: True)


def test_raises_mask__packed_sequences(model) -> None:
    kvkern.patch(model)
    with pytest.raises(UnsupportedError, match="mask function"):
        model(
            input_ids=torch.ones(1, 6, dtype=torch.long),
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]),
            use_cache=False,
        )


def test_raises_mask__own_padding_instead_of_prepares(prefix, model) -> None:
    inputs = prefix.prepare([[5, 6], [7]])
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with pytest.raises(UnsupportedError, match="prepare"):
        model(**inputs)
    inputs = prefix.prepare([[5, 6], [7, 8]])
    inputs["attention_mask"][1, 0] = 0
    with pytest.raises(UnsupportedError, match="prepare"):
        model(**inputs)


def test_raises_cache__used_inputs_passed_again(prefix, model) -> None:
    inputs = prefix.prepare([5, 6, 7])
    model.generate(**inputs, max_new_tokens=3)
    with pytest.raises(UnsupportedError, match="fresh inputs from prepare"):
        model.generate(**inputs, max_new_tokens=3)


def test_raises_prepare__nothing_to_go_on_from(prefix) -> None:
    for empty in ([], [[]], torch.zeros(1, 0, dtype=torch.long), [[5], []]):
        with pytest.raises(UnsupportedError, match="covers the whole prompt"):
            prefix.prepare(empty)


def test_raises_prepare__a_cache_that_is_not_live(prefix, store, model, doc) -> None:
    inputs = prefix.prepare([5, 6])
    cache = inputs["past_key_values"]
    with pytest.raises(LayoutError, match="not run yet"):
        prefix.prepare([7], cache=cache)
    with pytest.raises(LayoutError, match="DynamicCache"):
        prefix.prepare([7], cache=DynamicCache(config=model.config))
    out = model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(LayoutError, match="1 readers, input_ids 2 rows"):
        prefix.prepare([[7], [8]], cache=cache)
    with pytest.raises(LayoutError, match="the cache has seen 3"):
        prefix.prepare([7], cache=cache, after=out[:, :2])
    with pytest.raises(LayoutError, match="another prefix"):
        store.open(prefix.digest, model).prepare([7], cache=cache)


def test_raises_prepare__malformed_ids(prefix) -> None:
    with pytest.raises(LayoutError, match="integers"):
        prefix.prepare(torch.zeros(1, 2))
    with pytest.raises(LayoutError, match="attention_mask is"):
        prefix.prepare(torch.ones(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 3))


def test_raises_cache__interrupted_forward(prefix, model) -> None:
    inputs = prefix.prepare([5, 6])
    layer = model.model.layers[1].self_attn
    forward, layer.forward = layer.forward, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    layer.forward = forward
    with pytest.raises(kvkern.KvkernError, match="half updated"):
        model(**{**inputs, "attention_mask": None})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rms_norm_eps": 1e-5}, "config.rms_norm_eps"),
        ({"hidden_act": "gelu"}, "config.hidden_act"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "config.rope_parameters.rope_theta"),
        ({"num_attention_heads": 4}, "num_q_heads"),
    ],
)
def test_raises_open__another_configuration(store, doc, changes, field) -> None:
    digest = store.publish(tiny("qwen3"), doc).digest
    with pytest.raises(SpecMismatchError) as caught:
        store.open(digest, tiny("qwen3", **changes))
    assert caught.value.field == field
    assert repr(caught.value.stored) in str(caught.value) and repr(caught.value.wanted) in str(caught.value)


def test_raises_open__another_weight_salt_or_producer(store, doc) -> None:
    model = tiny("qwen3")
    digest = store.publish(model, doc, salt="alice").digest
    with pytest.raises(SpecMismatchError, match="salt"):
        store.open(digest, model)
    with pytest.raises(SpecMismatchError, match="producer"):
        store.open(digest, model, salt="alice", producer="contract")
    store.open(digest, model, salt="alice", producer="stock")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1
    with pytest.raises(SpecMismatchError, match="weights"):
        store.open(digest, model, salt="alice")


def test_raises_publish__what_cannot_be_published(store, doc, model) -> None:
    with pytest.raises(UnsupportedError, match="producer 'vllm' is not available: take 'stock' or 'contract'"):
        store.publish(model, doc, producer="vllm")
    with pytest.raises(LayoutError, match="doc_ids"):
        store.publish(model, [])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(LayoutError, match="v"):
        store.publish(model, doc)
    assert store.ls() == []


def test_raises_cache__a_static_cache_has_columns_beyond_the_queries(model) -> None:
    from transformers import StaticCache

    kvkern.patch(model)
    with pytest.raises(UnsupportedError, match="static one"):
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_raises_device__the_c_backend_reads_cpu_memory_only(prefix) -> None:
    cache = prefix.prepare([5, 6])["past_key_values"]
    k = torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16, device="meta")
    with pytest.raises(UnsupportedError, match="meta"):
        cache.update(k, k, 0)
    with pytest.raises(UnsupportedError, match="meta"):
        kvkern.KVView.from_dense(k, k)


def test_raises_publish__several_rows_are_not_one_document(store, model) -> None:
    with pytest.raises(LayoutError, match="doc_ids"):
        store.publish(model, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(LayoutError, match="doc_ids"):
        store.publish(model, [1.5, 2.0])


def test_raises_prepare__fractions_are_no_ids(prefix) -> None:
    with pytest.raises(LayoutError, match="integers"):
        prefix.prepare([[1.5, 2.0]])


def test_raises_open__another_context_length(store, doc) -> None:
    """Scaled RoPE may depend on max_position_embeddings."""
    digest = store.publish(tiny("qwen3"), doc).digest
    with pytest.raises(SpecMismatchError, match=r"config\.max_position_embeddings"):
        store.open(digest, tiny("qwen3", max_position_embeddings=4096))
