"""Adapters and quantisation stand in the spec: a document of one state is refused by a model in another."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from transformers.activations import ACT2FN

import kvkern
from kvkern import SpecMismatchError, UnsupportedError
from kvkern.model_patch.adapters import escaped
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.identity import spec_of
from tests.model_patch.conftest import tiny
from tests.support.bits import differing

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'kvkern[dev]'")


def lora(alpha: int = 8, **changes) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **changes
    )


def wrapped(alpha: int = 8, **changes) -> peft.PeftModel:
    """The same weights for the same arguments."""
    torch.manual_seed(11)
    return peft.get_peft_model(tiny("qwen3"), lora(alpha, **changes), adapter_name="first").eval()


def with_second(model: peft.PeftModel) -> peft.PeftModel:
    torch.manual_seed(12)
    model.add_adapter("second", lora())
    return model.eval()


def test_raises_open__every_state_of_the_adapters_is_another_spec(store: kvkern.Store, doc: list[int]) -> None:
    """On, off, another one active, another alpha, merged in place: each pair of states refuses each other by name."""
    model = with_second(wrapped())
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]

    def scaled(factor: float) -> None:
        for layer in layers:
            layer.scaling["first"] = factor

    states = {
        "first": (lambda: model.set_adapter("first"), lambda: None),
        "second": (lambda: model.set_adapter("second"), lambda: model.set_adapter("first")),
        "off": (model.disable_adapter_layers, model.enable_adapter_layers),
        "alpha": (lambda: scaled(16.0), lambda: scaled(2.0)),
        "merged": (model.merge_adapter, model.unmerge_adapter),
        "one layer": (lambda: layers[0].enable_adapters(False), lambda: layers[0].enable_adapters(True)),
    }
    digests, kv = {}, {}
    for name, (enter, leave) in states.items():
        enter()
        digests[name] = store.publish(model, doc).digest
        kv[name] = prefill(model, torch.tensor([doc]))
        store.open(digests[name], model)
        for other in states:
            if other != name and other in digests:
                with pytest.raises(SpecMismatchError, match=r"'config\.adapters\.|'weights'") as caught:
                    store.open(digests[other], model)
                if {name, other} != {"merged"}:
                    assert caught.value.field.startswith("config.adapters."), (name, other, caught.value.field)
        leave()
    for one, two in itertools.combinations(kv, 2):
        assert any(differing(a, b) for a, b in zip(kv[one], kv[two], strict=True)), (one, two)


def test_raises_match__a_base_model_is_not_handed_an_adapters_document(store: kvkern.Store, doc: list[int]) -> None:
    """The same base object, injected and with the adapter off, or without any."""
    model = wrapped()
    base = model.get_base_model()
    store.publish(base, doc)
    assert store.match(doc, base).tokens == len(doc) - 1
    with model.disable_adapter():
        assert store.match(doc, base) is None
        (line,) = store.why(doc, base)
        assert not line.is_usable and "config.adapters.is_on" in line.reason
    assert store.match(doc, model.unload()) is None


def test_open__an_unchanged_adapter_reads_its_own_documents(store: kvkern.Store, doc: list[int]) -> None:
    """PEFT as it is used: publish, patch, open, generate; stock goes on from its own cache to the same tokens."""
    model = wrapped()
    digest = store.publish(model, doc).digest
    question = [5, 6, 7, 8]
    whole = torch.tensor([doc + question])
    expected = model.generate(input_ids=whole, max_new_tokens=5, do_sample=False)[0, whole.shape[1] :]
    kvkern.patch(model)
    assert store.publish(model, doc, attention="model").tokens == len(doc)
    prefix = store.open(digest, model, check="recompute")
    out = model.generate(**prefix.prepare(question), max_new_tokens=5, do_sample=False)
    assert out[0, len(question) :].tolist() == expected.tolist()
    other = wrapped()  # another process: another object with the same adapter
    store.open(digest, other, check="recompute")


def test_raises_open__adapters_that_differ_in_one_thing(store: kvkern.Store, doc: list[int]) -> None:
    digest = store.publish(wrapped(), doc).digest
    for other, field in (
        (wrapped(64), "config.adapters.attached.first.config.lora_alpha"),
        (wrapped(use_rslora=True), "config.adapters.attached.first.config.use_rslora"),
        (with_second(wrapped()), "config.adapters."),
    ):
        with pytest.raises(SpecMismatchError) as caught:
            store.open(digest, other)
        assert caught.value.field.startswith(field), caught.value.field
    other = wrapped()
    tensor = other.base_model.model.model.layers[0].self_attn.q_proj.lora_A["first"].weight
    with torch.no_grad():
        tensor[0, 0] += 1
    with pytest.raises(SpecMismatchError, match=r"config\.adapters\.attached\.first\.weights"):
        store.open(digest, other)
    with pytest.raises(SpecMismatchError):
        store.open(digest, tiny("qwen3"))


def test_spec__names_are_escaped_so_that_no_two_are_confused() -> None:
    names = ("a.b", "a%2Eb", "a%b", "a%25b", "a b", "%", ".")
    assert len({escaped(name) for name in names}) == len(names)
    assert escaped("a.b") == "a%2Eb" and escaped("a%2Eb") == "a%252Eb"
    model = tiny("qwen3")
    model.add_adapter(lora(), "100%")
    assert "100%25" in spec_of(model).config["adapters"]["attached"]
    torch.manual_seed(11)
    by_layer = peft.get_peft_model(tiny("qwen3"), lora(alpha_pattern={"layers.0.self_attn.q_proj": 2})).eval()
    settings = spec_of(by_layer).config["adapters"]["attached"]["default"]["settings"]
    assert settings["scaling"]["base_model%2Emodel%2Emodel%2Elayers%2E0%2Eself_attn%2Eq_proj"] == 0.5


def test_raises_publish__virtual_tokens_are_no_part_of_a_document(store: kvkern.Store, doc: list[int]) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedError, match="virtual tokens in front of the prompt"):
        store.publish(peft.get_peft_model(tiny("qwen3"), config).eval(), doc)


def test_raises_adapters__a_hook_inside_of_one_is_found(store: kvkern.Store, doc: list[int]) -> None:
    model = wrapped()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["first"].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(UnsupportedError, match=r"q_proj\.lora_B\.first has a forward hook"):
        store.publish(model, doc)


def test_raises_open__modules_inside_of_an_adapter(store: kvkern.Store, doc: list[int]) -> None:
    """A dropout that computes something, a variant that one layer lacks, a copied norm of another eps."""

    def softplus(model: peft.PeftModel) -> None:
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["first"] = torch.nn.Softplus()

    def variant(model: peft.PeftModel) -> None:
        del model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant["first"]

    def copied_eps(model: peft.PeftModel) -> None:
        model.base_model.model.model.layers[1].input_layernorm.modules_to_save["first"].variance_epsilon = 0.5

    for changes, change, field in (
        ({}, softplus, "modules"),
        ({"use_dora": True}, variant, "attached.first.settings.lora_variant"),
        ({"modules_to_save": ["input_layernorm"]}, copied_eps, "modules"),
    ):
        model = wrapped(**changes)
        digest = store.publish(model, doc).digest
        store.open(digest, model, check="recompute")
        change(model)
        with pytest.raises(SpecMismatchError) as caught:
            store.open(digest, model)
        assert caught.value.field.startswith(f"config.adapters.{field}"), caught.value.field


@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}])
def test_open__an_adapter_of_the_embedding_is_recomputed(changes: dict, store: kvkern.Store, doc: list[int]) -> None:
    torch.manual_seed(4)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})
    model = peft.get_peft_model(tiny("qwen3"), config).eval()
    store.open(store.publish(model, doc).digest, model, check="recompute")


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3").save_pretrained(folder)
    return folder


def int8(folder, threshold: float):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'kvkern[dev]'")
    from transformers import BitsAndBytesConfig, Qwen3ForCausalLM

    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Qwen3ForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=settings
        ).eval()


@pytest.mark.filterwarnings("ignore")
def test_open__int8_reads_its_own_documents_and_no_other_thresholds(store, doc: list[int], int8_folder) -> None:
    model = int8(int8_folder, 6.0)
    digest = store.publish(model, doc).digest
    found = store.open(digest, model, check="recompute").recomputed
    assert found.rule == "distance" and "quantised" in found.reason
    kvkern.patch(model)
    out = model.generate(**store.open(digest, model).prepare([5, 6, 7]), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)
    with pytest.raises(SpecMismatchError, match=r"'config\.quantization\.llm_int8_threshold'.* 6\.0.* 1\.0"):
        store.open(digest, int8(int8_folder, 1.0))
    with pytest.raises(SpecMismatchError, match=r"config\.quantization|'weights'"):
        store.open(digest, tiny("qwen3"))
    own = model.model.layers[0].mlp.act_fn
    model.model.layers[0].mlp.act_fn = ACT2FN["relu2"]
    with pytest.raises(UnsupportedError, match=r"act_fn is a .*ReLUSquaredActivation, its configuration gives"):
        store.open(digest, model)
    model.model.layers[0].mlp.act_fn = own
    model.model.layers[0].mlp.up_proj.state.threshold = 1.0
    with pytest.raises(UnsupportedError, match=r"up_proj\.state\.threshold is 1\.0, its configuration gives 6\.0"):
        store.open(digest, model)
