"""The model's own eager attention is compared with stock eager's: every other form is found, named, and refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import repeat_kv

import kvkern
from kvkern import KVView, UnsupportedError, probe
from kvkern.model_patch import calls, eager_form, witness
from kvkern.model_patch.eager_form import check_form
from kvkern.model_patch.witness import FORMS, Witness, differing, plain_form, stock_output, witnesses
from tests.model_patch.conftest import tiny
from tests.support.families import build
from tests.support.stock import PROBE

FULL = {"layer_types": ["full_attention"] * 2}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without the results of other tests."""
    monkeypatch.setattr(eager_form, "_JUDGED", type(eager_form._JUDGED)())


def replace_llama_eager(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """Put another function where Llama's attention class looks its own up."""
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", function)


@pytest.fixture(params=["against C", "against plain torch"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU that follows the contract's order, and one that does not."""
    if request.param == "against C":
        if not PROBE.follows:
            pytest.skip(PROBE.reason)
    else:
        other = dataclasses.replace(PROBE, follows=False)
        monkeypatch.setattr(witness, "stock_order", lambda: other)
    return request.param


@pytest.mark.parametrize(
    ("family", "changes", "what", "rounds_elsewhere"),
    [
        ("gpt2", {}, "softmax in bfloat16", True),
        ("llama4_text", FULL, "softmax in bfloat16", True),
        ("gemma2", {**FULL, "sliding_window": None}, "a softcap of the scores", False),
        ("gpt_oss", {**FULL, "sliding_window": None}, "attention sinks", False),
        ("granite_swa", {**FULL, "sliding_window": None}, "attention sinks", False),
    ],
)
def test_bits_form__other_forms_are_found_by_name(family, changes, what, rounds_elsewhere, host) -> None:
    model = build(family, **changes)
    form = check_form(model)
    assert not form.equal and form.rounds_elsewhere is rounds_elsewhere
    assert form.reason.startswith(f"{what}; ") and "outputs differ, the first is" in form.reason
    with pytest.raises(UnsupportedError, match=r"not stock eager: |softcap|sinks"):
        kvkern.patch(model, allow_other_bits=not rounds_elsewhere)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt"])
def test_bits_form__stock_forms_are_equal(family, host) -> None:
    """With and without grouped heads."""
    form = check_form(build(family))
    assert form.equal and form.function.endswith(".eager_attention_forward")


def test_bits_form__random_calls_at_multiples_of_16_see_nothing(monkeypatch) -> None:
    """The twin: with such widths the check takes GPT-2 for stock."""
    monkeypatch.setattr(witness, "WIDTHS", (16, 32, 48))
    assert check_form(build("gpt2")).equal


def test_bits_form__random_rows_alone_see_nothing(monkeypatch) -> None:
    """The twin: a few random rows at the right widths do not show what happens once in 70,000."""
    monkeypatch.setattr(witness, "_TAIL_SCORES", ())
    assert check_form(build("gpt2")).equal


def test_bits_witness__each_known_form_differs_from_every_other(host) -> None:
    made = witnesses(8, 2, CPU)
    outputs = {"stock": [stock_output(call) for call in made]}
    outputs |= {name: [plain_form(call, **arguments) for call in made] for name, arguments in FORMS.items()}
    for one, other in itertools.combinations(outputs, 2):
        pairs = zip(outputs[one], outputs[other], strict=True)
        assert sum(int(differing(a, b).sum()) for a, b in pairs) > 0, (one, other)


def test_bits_witness__widths_are_from_17_on_and_never_divisible_by_8() -> None:
    assert len(witness.WIDTHS) >= 3 and all(width >= 17 and width % 8 for width in witness.WIDTHS)


def _eager(order: str):
    """Llama's own eager attention with one thing done otherwise."""

    def own_eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        groups = module.num_key_value_groups
        scaling = query.shape[-1] ** -0.5 if scaling is None and order != "default scaling" else scaling or 1.0
        k, v = repeat_kv(key, groups), repeat_kv(value, groups)
        if order == "key heads":
            k = key.repeat(1, groups, 1, 1)
        if order == "value heads":
            v = value.repeat(1, groups, 1, 1)
        if order == "scaling ignored":
            scaling = query.shape[-1] ** -0.5
        if order == "queries scaled":
            scores = (query * scaling) @ k.mT
        elif order == "float32 scores":
            scores = query.float() @ k.mT.float() * scaling
        else:
            scores = query @ k.mT * scaling
        if order != "no mask":
            scores = scores + attention_mask
        if order == "temperature":
            scores = scores / 1.1
        if order == "wide softcap":
            scores = 500 * torch.tanh(scores / 500)
        if order == "clamped":
            scores = scores.clamp(max=64.0)
        if order == "faint sink":
            scores = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), -20.0)], -1)
        p = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]]
        out = p @ v.float() if order == "unrounded" else p.to(v.dtype) @ v
        return out.to(v.dtype).transpose(1, 2).contiguous(), p

    return own_eager_attention_forward


@pytest.mark.parametrize(
    ("order", "rounds_elsewhere", "what"),
    [
        ("key heads", False, "another form"),
        ("value heads", False, "another form"),
        ("wide softcap", False, "another form"),
        ("clamped", False, "another form"),
        ("faint sink", False, "another form"),
        ("scaling ignored", False, "another form"),
        ("default scaling", False, "another form"),
        ("temperature", False, "another form"),
        ("no mask", False, "a softmax that is not causal"),
        ("queries scaled", True, "queries scaled before the product"),
        ("float32 scores", True, "scores kept in float32"),
        ("unrounded", True, "probabilities not rounded to bfloat16"),
    ],
)
def test_bits_form__a_function_of_somebodys_own_code(order, rounds_elsewhere, what, host, monkeypatch) -> None:
    """What the attention class's module holds now is judged, not what it held when transformers was written."""
    model = tiny("llama")
    assert check_form(model).equal
    replace_llama_eager(monkeypatch, _eager(order))
    form = check_form(model)
    assert (form.equal, form.rounds_elsewhere, form.reason.partition(";")[0]) == (False, rounds_elsewhere, what)
    assert "own_eager_attention_forward" in form.function


def test_form__an_unchanged_copy_of_the_function_is_equal(host, monkeypatch) -> None:
    model = tiny("llama")
    replace_llama_eager(monkeypatch, _eager("stock"))
    form = check_form(model)
    assert form.equal and "own_eager_attention_forward" in form.function


def test_form__a_function_that_cannot_be_run_is_refused(monkeypatch) -> None:
    def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0):
        raise RuntimeError("no such kernel")

    replace_llama_eager(monkeypatch, eager_attention_forward)
    with pytest.raises(UnsupportedError, match=r"cannot be run on the witness rows \(RuntimeError: no such kernel\)"):
        kvkern.patch(tiny("llama"), allow_other_bits=True)


def test_form__a_function_runs_once_and_again_where_its_module_has_another_attribute(monkeypatch) -> None:
    runs = []
    original = modeling_llama.eager_attention_forward

    def eager_attention_forward(module, *args, **kwargs):
        runs.append(getattr(module, "extra", None))
        return original(module, *args, **kwargs)

    replace_llama_eager(monkeypatch, eager_attention_forward)
    model = tiny("llama")
    for module in model.model.layers:
        module.self_attn.extra = 1
    check_form(model)
    once = len(runs)
    assert once == len(witnesses(6, 2, CPU)) - 1, "the default scaling is not asked for: this function has none"
    check_form(model)
    check_form(tiny("llama"))
    assert len(runs) == 2 * once, "a module without that attribute is another case"
    model.model.layers[1].self_attn.extra = 2
    check_form(model)
    assert len(runs) == 3 * once


def test_form__a_module_with_a_tensor_is_judged_with_its_own(host) -> None:
    """gpt-oss: sinks so far below every score that they take nothing are no difference; the next model's are."""
    model = build("gpt_oss", sliding_window=None, **FULL)
    other = build("gpt_oss", sliding_window=None, **FULL)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    quiet, loud = check_form(model), check_form(other)
    assert quiet.reason.startswith("softmax in bfloat16"), "with no sinks its softmax still is in bf16"
    assert loud.reason.startswith("attention sinks")


def test_form__the_layer_that_is_least_like_stock_decides(monkeypatch) -> None:
    """Rounding elsewhere in one layer may be taken; another function in a later one may not."""

    def eager_attention_forward(module, *args, **kwargs):
        return _eager(module.order)(module, *args, **kwargs)

    replace_llama_eager(monkeypatch, eager_attention_forward)
    model = tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    first.order, second.order = "queries scaled", "stock"
    assert check_form(model).rounds_elsewhere
    second.order = "no mask"
    form = check_form(model)
    assert not form.rounds_elsewhere and form.reason.startswith("a softmax that is not causal")


def _reason() -> str:
    k = torch.zeros(1, 2, 20, 32, dtype=torch.bfloat16)
    return kvkern.resolve(torch.zeros(1, 2, 1, 32, dtype=torch.bfloat16), KVView.from_dense(k, k)).reason


def test_patch__goes_on_when_asked_and_resolve_says_so() -> None:
    model = build("gpt2")
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel.*softmax in bfloat16.*allow_other_bits=True"):
        kvkern.patch(model)
    assert "GPT2" not in _reason()
    kvkern.patch(model, allow_other_bits=True)
    assert "not the bits of GPT2LMHeadModel's own eager (softmax in bfloat16; " in _reason()
    model(input_ids=torch.arange(3, 20)[None])
    kvkern.unpatch(model)
    assert "GPT2" not in _reason()
    kvkern.patch(model, allow_other_bits=True)
    del model
    import gc

    gc.collect()
    assert "GPT2" not in _reason(), "a model that is gone says nothing"


def test_patch__fast_has_bits_of_its_own_and_refuses_other_functions_only() -> None:
    gpt2 = build("gpt2", num_attention_heads=4)
    kvkern.patch(gpt2, profile="fast")
    assert gpt2.config._attn_implementation == "kvkern_fast" and "GPT2" not in _reason()
    gpt_oss = build("gpt_oss", sliding_window=None, head_dim=64, **FULL)
    with pytest.raises(UnsupportedError, match=r"attention sinks.*leave the model unpatched"):
        kvkern.patch(gpt_oss, profile="fast", allow_other_bits=True)


def test_raises_patch__a_branch_that_only_eager_takes() -> None:
    """GPT-2 with float32 scores, DeepSeek V3.2's indexer: what eager runs is not the function alone."""
    with pytest.raises(UnsupportedError, match="something else under 'eager'"):
        kvkern.patch(build("gpt2", reorder_and_upcast_attn=True), allow_other_bits=True)
    with pytest.raises(UnsupportedError, match=r"MiniMaxM3VLAttention.*something else under 'eager'"):
        kvkern.patch(build("minimax_m3_vl_text"))


def test_raises_patch__arguments_that_attention_refuses() -> None:
    model = build("gemma3_text", **FULL, sliding_window=None)
    kvkern.patch(model)
    model.model.layers[1].self_attn.sliding_window = 16
    with pytest.raises(UnsupportedError, match="Gemma3Attention attends with sliding_window=16"):
        kvkern.patch(model)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_raises_mla__by_that_word_at_patch_and_publish(family, store, doc) -> None:
    """glm4_moe_lite: keys and values of one width are refused too, since its cache holds no keys."""
    model = build(family)
    with pytest.raises(UnsupportedError, match=r"multi-head latent attention \(MLA"):
        kvkern.patch(model)
    with pytest.raises(UnsupportedError, match=r"multi-head latent attention \(MLA"):
        store.publish(model, doc)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("mimo_v2_flash", {"v_head_dim": 16}, "value head_dim 16 and key head_dim 32"),
        ("gemma4_text", {}, "head_dim that differs from layer to layer"),
        ("doge", {}, "a mask of its own"),
        ("bert", {"is_decoder": False}, "attention that is not causal"),
    ],
)
def test_raises_patch__by_name(family, changes, what) -> None:
    model = build(family, **changes)
    if changes.get("is_decoder") is False:
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    with pytest.raises(UnsupportedError, match=what):
        kvkern.patch(model)


def test_raises_patch__a_model_that_keeps_its_attention(model, monkeypatch) -> None:
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_, **__: None)
    with pytest.raises(UnsupportedError, match="does not let its attention implementation be set"):
        kvkern.patch(model)


def test_raises_attention__values_changed_after_the_cache(prefix, model) -> None:
    """The kernel reads values from the published blocks: a model that scales them first must not be computed."""
    from kvkern.model_patch.attention import attention_forward

    cache = prefix.prepare([5, 6])["past_key_values"]
    k = torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16)
    key, value = cache.update(k, k, 0)
    q = torch.zeros(1, 6, 2, 32, dtype=torch.bfloat16)
    module = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="changes its values after the cache"):
        attention_forward(module, q, key, value * 0.5, None)
    attention_forward(module, q, key, value, None)


def test_raises_attention__is_causal_as_an_argument(model) -> None:
    from kvkern.model_patch.attention import attention_forward

    q, k = torch.zeros(1, 6, 2, 32, dtype=torch.bfloat16), torch.zeros(1, 2, 2, 32, dtype=torch.bfloat16)
    module = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="not causal"):
        attention_forward(module, q, k, k, None, is_causal=False)
    attention_forward(module, q, k, k, None, is_causal=True)


def test_probe__another_exponential_is_another_order(monkeypatch) -> None:
    """Where torch's softmax has other exponentials, C is no measure of a form."""
    softmax = probe.F.softmax
    monkeypatch.setattr(probe.F, "softmax", lambda x, **o: softmax(x, **o) * (1 + 2.0**-20))
    found = probe.stock_order.__wrapped__()
    assert not found.follows and "the contract's exponential in softmax" in found.reason


def test_env__says_what_patch_makes_of_a_model(tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from kvkern.cli import app
    from kvkern.model_patch import load

    models = {"gpt2": build("gpt2"), "llama": tiny("llama")}
    monkeypatch.setattr(load, "load_model", lambda name, **_: (models[name], None))
    found = {
        name: json.loads(CliRunner().invoke(app, ["env", "--model", name, "--format", "json"]).stdout)["model"]
        for name in models
    }
    assert found["llama"]["eager"]["equal"] and found["llama"]["patch"].startswith("taken")
    assert found["gpt2"]["patch"].startswith("refused") and "softmax in bfloat16" in found["gpt2"]["eager"]["reason"]


def test_calls__every_attention_class_here_has_a_function() -> None:
    site = calls._call_site(modeling_gpt2.GPT2Attention)
    assert site.branches_on_eager and isinstance(site.function, FunctionType)
    assert calls._call_site(nn.Linear) is None


def test_witness__holds_one_call_of_each_kind() -> None:
    made = witnesses(8, 2, CPU)
    assert [call.q.shape[2] for call in made] == [1, 1, 1, 16, 16] and made[-1].scaling is None
    assert all(isinstance(call, Witness) and call.k.shape[1] == 2 for call in made)
