"""Patch, unpatch, prepare: what a user of the drop-in patch relies on. Bits against stock are in tests/e2e."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import kvkern
from tests.model_patch.conftest import tiny
from tests.support.bits import differing
from tests.support.models import stock_cache
from tests.support.stock import needs_stock_order


def test_patch__is_undone_by_unpatch(model) -> None:
    model.set_attn_implementation("sdpa")
    kvkern.patch(model)
    kvkern.patch(model)
    assert model.config._attn_implementation == "kvkern"
    kvkern.unpatch(model)
    kvkern.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


@needs_stock_order
def test_bits_patch__tiny_models_equal_stock_with_and_without_a_prefix(model, prefix, doc) -> None:
    question = [5, 6, 7, 8, 9]
    ids = torch.tensor([doc + question])
    kvkern.unpatch(model)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        continued = model(input_ids=ids[:, 70:], past_key_values=stock_cache(model, doc)).logits
    kvkern.patch(model)
    with torch.inference_mode():
        assert differing(model(input_ids=ids).logits, whole) == 0
        assert differing(model(**prefix.prepare(question)).logits, continued) == 0


def test_prepare__builds_full_mask_and_positions(prefix) -> None:
    inputs = prefix.prepare([[5, 6, 7], [8]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].shape == (2, 73)
    assert inputs["attention_mask"][1].tolist() == [1] * 70 + [0, 0, 1]
    assert inputs["position_ids"].tolist() == [[70, 71, 72], [70, 70, 70]]


def test_prepare__a_list_of_numpy_integers_is_one_row(prefix) -> None:
    row = list(np.array([5, 6, 7]))
    assert prefix.prepare(row)["input_ids"].tolist() == [[5, 6, 7]]
    assert prefix.prepare([np.array([5, 6]), [7]])["input_ids"].tolist() == [[5, 6], [0, 7]]


def test_bits_cache__strided_states_are_read_by_their_strides(prefix, model) -> None:
    """Some models hand over states whose innermost axis is not dense."""
    caches = [prefix.prepare([5, 6])["past_key_values"] for _ in range(2)]
    k, v = torch.randn(2, 1, 2, 2, 32).bfloat16()
    caches[0].update(k, v, 0)
    caches[1].update(*(x.mT.contiguous().mT for x in (k, v)), 0)
    views = [cache.view(0) for cache in caches]
    for name in ("suffix_k", "suffix_v"):
        assert differing(*(getattr(view, name) for view in views)) == 0


def test_prepare__takes_what_a_tokenizer_returns(prefix, model) -> None:
    expected = model(**prefix.prepare([[5, 6, 7], [8]])).logits[:, -1]
    for ids, mask in (
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
    ):
        inputs = prefix.prepare(torch.tensor(ids), attention_mask=torch.tensor(mask))
        assert differing(model(**inputs).logits[:, -1], expected) == 0


def test_prepare__eight_readers_hold_one_copy_of_the_prefix(prefix, model) -> None:
    caches = [prefix.prepare([5 + i])["past_key_values"] for i in range(8)]
    views = []
    for i, cache in enumerate(caches):
        model(input_ids=torch.tensor([[5 + i]]), past_key_values=cache)
        views.append(cache.view(0))
    assert len({view.pool.data_ptr() for view in views}) == 1
    assert len({view.suffix_k.data_ptr() for view in views}) == 8


def test_prepare__inputs_in_chunks_equal_one_chunk(prefix, model) -> None:
    """Prefill in chunks, as generate(prefill_chunk_size=) does it, over ragged rows."""
    rows = [[5, 6, 7, 8, 9, 10], [11, 12]]
    whole = model.generate(**prefix.prepare(rows), max_new_tokens=4, do_sample=False)
    inputs = prefix.prepare(rows)
    cache, ids, mask = inputs["past_key_values"], inputs["input_ids"], inputs["attention_mask"]
    positions = inputs["position_ids"]
    for begin in (0, 2, 4):
        logits = model(
            input_ids=ids[:, begin : begin + 2], past_key_values=cache, attention_mask=mask[:, : 72 + begin],
            position_ids=positions[:, begin : begin + 2],
        ).logits  # fmt: skip
    assert logits[:, -1].argmax(-1).tolist() == whole[:, 6].tolist()


def test_cache__rows_can_be_selected_repeated_and_reset(prefix, model) -> None:
    inputs = prefix.prepare([[5, 6, 7], [8]])
    cache = inputs["past_key_values"]
    model(**inputs)
    cache.batch_select_indices(torch.tensor([1]))
    alone = prefix.prepare([8])
    model(**alone)
    step = {"input_ids": torch.tensor([[9]]), "position_ids": torch.tensor([[71]])}
    mask = torch.tensor([[1] * 70 + [0, 0, 1, 1]])
    expected = model(**step, past_key_values=alone["past_key_values"]).logits
    assert differing(model(**step, past_key_values=cache, attention_mask=mask).logits, expected) == 0
    cache.batch_repeat_interleave(3)
    assert cache.lens.tolist() == [72] * 3
    cache.reset()
    assert cache.get_seq_length() == 70 and cache.lens.tolist() == [70] * 3
    with pytest.raises(kvkern.UnsupportedError, match="shared prefix"):
        cache.crop(-1)


def test_cache__sampling_several_sequences_repeats_the_rows(prefix, model) -> None:
    out = model.generate(**prefix.prepare([5, 6]), max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, 5)


def test_bits_cache__goes_on_in_and_out_of_inference_mode(prefix, model) -> None:
    """Turns may be run under either; what the cache keeps from one must be writable in the other."""
    logits = []
    for contexts in (
        (torch.no_grad, torch.no_grad),
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
    ):
        inputs = prefix.prepare([5, 6])
        for context in contexts:
            with context():
                last = model(**inputs).logits[:, -1].clone()
            inputs = prefix.prepare([7], cache=inputs["past_key_values"])
        logits.append(last)
    assert all(differing(logits[0], other) == 0 for other in logits[1:])


def test_tokens_cache__a_cache_that_was_cropped_to_the_prefix_serves_beams(prefix, model) -> None:
    """Its layers hold tiles of the batch before: they are repeated, too."""
    fresh = model.generate(**prefix.prepare([5, 6]), max_new_tokens=3, do_sample=False, num_beams=2)
    inputs = prefix.prepare([7, 8, 9])
    cache = inputs["past_key_values"]
    model(**inputs)
    cache.crop(-3)
    again = model.generate(**prefix.prepare([5, 6], cache=cache), max_new_tokens=3, do_sample=False, num_beams=2)
    assert torch.equal(again, fresh)


def test_import__kvkern_alone_loads_neither_transformers_nor_triton() -> None:
    code = "import sys, kvkern; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_store__put_ls_and_verify_need_no_transformers(tmp_path) -> None:
    code = f"""
import sys
sys.modules["transformers"] = None
import torch, kvkern
store = kvkern.Store({str(tmp_path / "store")!r})
spec = kvkern.KVSpec(weights="0" * 64, architecture="none", num_layers=2, num_q_heads=4, num_kv_heads=2,
                     head_dim=32, config={{}})
kv = torch.randn(2, 2, 300, 32).bfloat16()
done = store.put(spec, range(300), kv, kv)
assert [line.digest for line in store.ls()] == [done.digest] and store.verify().ok
print(done.tokens, done.blocks_new)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["300", "2"]


def test_spec__two_versions_of_a_model_class_agree() -> None:
    from kvkern.model_patch.identity import spec_of

    spec = spec_of(tiny("qwen3"))
    assert set(spec.config) == {"attention_bias", "hidden_act", "hidden_size", "intermediate_size",
                                "max_position_embeddings", "rms_norm_eps",
                                "rope_parameters", "vocab_size"}  # fmt: skip
