"""KV of another computation: whatever changes what a model computes is in the spec, or is refused by name."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import kvkern
from kvkern import SpecMismatchError, UnsupportedError
from kvkern.model_patch import as_configured
from kvkern.model_patch.as_configured import unnamed_change
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.identity import spec_of
from tests.model_patch.conftest import tiny
from tests.support.bits import differing


def eps(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = model.model.layers[0].input_layernorm.variance_epsilon = 1e-2


def scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


def inv_freq(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.5)


def window(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.sliding_window = 32


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = functools.partial(lambda self, x: x, mlp)


def layer_order(model: PreTrainedModel) -> None:
    model.model.layers[0] = model.model.layers[1]


class Louder(modeling_qwen3.Qwen3MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def other_layer_class(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.__class__ = modeling_llama.LlamaMLP


def module_class(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.__class__ = Louder


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrization(model: PreTrainedModel) -> None:
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Twice())


def config_of_one_layer(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"


def call_of_a_module(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp._compiled_call_impl = lambda x: 2 * x


def shadowed_module(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.__dict__["act_fn"] = torch.tanh


def shadowed_bias(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_proj.__dict__["bias"] = torch.ones(64, dtype=torch.bfloat16)


def state_dict_that_lies(model: PreTrainedModel) -> None:
    honest = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.state_dict = lambda *_, **__: honest


def state_dict_hook(model: PreTrainedModel) -> None:
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: None)


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def tensor_class(model: PreTrainedModel) -> None:
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Doubled), requires_grad=False)


CHANGES: dict[Callable[[PreTrainedModel], None], str] = {
    eps: r"input_layernorm\.variance_epsilon is 0\.01, its configuration gives 1e-06",
    scaling: r"layers\.0\.self_attn\.scaling is 0\.5, its configuration gives 0\.17",
    inv_freq: r"rotary_emb\.inv_freq differs from its configuration's in 16 of 16 elements",
    window: r"self_attn\.sliding_window is 32, its configuration gives None",
    hook: r"layers\.0 has a forward hook \(.*hook\.<locals>\.<lambda>\)",
    pre_hook: r"layers\.0\.mlp has a forward hook",
    forward: r"layers\.0\.mlp has a forward of its own",
    layer_order: r"layers\.0\.self_attn\.layer_idx is 1, its configuration gives 0",
    module_class: r"layers\.0\.mlp has the class .*Louder of another package",
    other_layer_class: r"layers\.0\.mlp is a .*LlamaMLP, its configuration gives a .*Qwen3MLP",
    call_of_a_module: r"layers\.0\.mlp has a compiled call of its own",
    shadowed_module: r"layers\.0\.mlp has an attribute in the place of its act_fn",
    shadowed_bias: r"k_proj has an attribute in the place of its bias",
    state_dict_that_lies: r"Qwen3ForCausalLM has a state_dict of its own",
    state_dict_hook: r"Qwen3ForCausalLM has a hook of its state dict",
    tensor_class: r"up_proj has a tensor of the class .*Doubled as its weight",
    parametrization: r"up_proj has a parametrization",
    config_of_one_layer: r"self_attn\.config attends by 'sdpa', the model's by 'eager'",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_raises_stock__what_the_spec_cannot_name(change, store: kvkern.Store, doc: list[int]) -> None:
    """Each of these changes K or V, or would for other weights, and leaves every tensor's bytes."""
    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    before = spec_of(model)
    change(model)
    for refused in (
        lambda: store.publish(model, doc),
        lambda: store.publish(model, doc, attention="model"),
        lambda: store.open(digest, model),
    ):
        with pytest.raises((UnsupportedError, SpecMismatchError), match=f"{CHANGES[change]}|'weights'"):
            refused()
    if change not in (layer_order, parametrization):  # these two change names or tensors as well
        assert change in (tensor_class, call_of_a_module) or spec_of(model) == before
        with pytest.raises(UnsupportedError, match=CHANGES[change]):
            store.open(digest, model)
        with pytest.raises(UnsupportedError, match=CHANGES[change]):
            store.match(doc, model)
        (line,) = store.why(doc, model)
        assert not line.is_usable and line.differences[0][0] == "computation" and line.differences[0][2] in line.reason


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


REPLACED = ["class", "function", "wrapped class", "wrapped function", "inner function", "call", "init", "torch", "mode",
            "global", "module class"]  # fmt: skip


@pytest.mark.parametrize("where", REPLACED)
def test_raises_stock__code_that_is_replaced_for_all_models(
    where: str, store: kvkern.Store, doc: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries of fused kernels do it: a class's forward, a function of its module, a hook on everything."""
    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    if where == "class":
        monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", lambda self, x: x)
        named = r"a forward that .*<lambda> has replaced in Qwen3MLP"
    elif where == "function":
        original = modeling_qwen3.apply_rotary_pos_emb

        def mine(*args, **kwargs):
            return original(*args, **kwargs)

        monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", mine)
        named = r"a forward that calls .*mine"
    elif where == "wrapped class":
        original = modeling_qwen3.Qwen3MLP.forward
        monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", functools.wraps(original)(lambda self, x: x))
        named = r"a forward that .*Qwen3MLP\.forward has replaced in Qwen3MLP"
    elif where == "wrapped function":
        original = modeling_qwen3.apply_rotary_pos_emb
        monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", functools.wraps(original)(lambda q, k, *_: (q, k)))
        named = r"a forward that calls .*apply_rotary_pos_emb"
    elif where == "inner function":
        monkeypatch.setattr(modeling_qwen3, "rotate_half", lambda x: x)
        named = r"a forward that calls .*<lambda>"
    elif where == "call":
        monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "__call__", lambda self, x: x, raising=False)
        named = r"a __call__ that .*<lambda> has replaced in Qwen3MLP"
    elif where == "init":
        monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "__init__", lambda self, config: None)
        named = r"a __init__ that .*<lambda> has replaced in Qwen3MLP"
    elif where == "torch":
        monkeypatch.setattr(nn.functional, "silu", lambda x, inplace=False: x)
        named = r"torch's silu has been replaced"
    elif where == "mode":
        mode = Mode()
        mode.__enter__()
        named = r"a mode of torch is on"
    elif where == "module class":
        monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", Louder)
        model, named = tiny("qwen3"), "the class .*Louder of another package"
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        monkeypatch.callback = handle.remove  # kept alive
        named = "a forward hook for all modules"
    try:
        with pytest.raises(UnsupportedError, match=named):
            store.open(digest, model)
        with pytest.raises(UnsupportedError, match=named):
            store.publish(model, doc)
    finally:
        if where == "global":
            handle.remove()
        if where == "mode":
            mode.__exit__(None, None, None)
    monkeypatch.undo()
    store.open(digest, tiny("qwen3"))


def test_raises_open__weights_are_scaled_through_data(store: kvkern.Store, doc: list[int]) -> None:
    """Torch does not count such a write; some cache lines of every tensor are read again."""
    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    store.open(digest, model)
    for weight in (model.model.layers[1].self_attn.k_proj.weight, model.model.norm.weight):
        weight.data.mul_(2)
        with pytest.raises(SpecMismatchError, match="'weights'"):
            store.open(digest, model)
        weight.data.div_(2)
        store.open(digest, model)


def test_raises_publish__dropout_in_training_mode(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("qwen3", attention_dropout=0.5).train()
    with pytest.raises(UnsupportedError, match=r"drops 0\.5 of its values in training mode: call model\.eval\(\)"):
        store.publish(model, doc, attention="model")
    store.publish(model.eval(), doc)


def test_bits_publish__autocast_changes_nothing(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    with torch.autocast("cpu", dtype=torch.float16):
        assert store.publish(model, doc).digest == digest
        store.open(digest, model, check="recompute")


def plain(model: PreTrainedModel) -> PreTrainedModel:
    return model


def captured(model: PreTrainedModel) -> PreTrainedModel:
    """One call with output_hidden_states leaves hooks on every layer."""
    model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    return model


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """As `device_map` over several devices does it: a hook around the forward of every module."""
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=module is model))
    return model


def compiled_forward(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def compiled_layer(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager")
    return model


def another_padding_token(model: PreTrainedModel) -> PreTrainedModel:
    model.config.pad_token_id = 5
    return model


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable()
    return model


KNOWN = [plain, captured, placed, compiled_forward, compiled_in_place, compiled_layer, another_padding_token,
         checkpointed]  # fmt: skip


@pytest.mark.parametrize("change", KNOWN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_bits_stock__what_is_known_to_change_nothing(kind: str, change, store: kvkern.Store, doc: list[int]) -> None:
    """Recognised by type: the document keeps its name, and so do its bits."""
    digest = store.publish(tiny(kind), doc).digest
    model = change(tiny(kind))
    assert unnamed_change(model) is None
    store.open(digest, model)
    assert store.publish(model, doc).digest == digest
    assert differing(prefill(model, torch.tensor([doc]))[0], prefill(tiny(kind), torch.tensor([doc]))[0]) == 0


@pytest.mark.parametrize("change", [compiled_forward, compiled_in_place, compiled_layer], ids=lambda c: c.__name__)
def test_publish__a_compiled_model_is_recorded_where_it_ran(change, store: kvkern.Store, doc: list[int]) -> None:
    model = change(tiny("qwen3"))
    spec = store.open(store.publish(model, doc, attention="model").digest, model).spec
    assert spec.producer_info["compiled"] is True
    assert "compiled" not in store.open(store.publish(model, doc).digest, model).spec.producer_info


def test_scope__hooks_of_output_capture_are_no_obstacle(store: kvkern.Store, doc: list[int], trusted_tables) -> None:
    model = captured(tiny("qwen3"))
    kvkern.patch(model, scope="model")
    expected = tiny("qwen3")
    kvkern.patch(expected, scope="model")
    ids = torch.tensor([doc])
    with torch.inference_mode():
        assert differing(model(ids).logits, expected(ids).logits) == 0
    assert store.publish(model, doc, producer="contract").tokens == len(doc)


def test_spec__sliding_windows_do_not_share_a_spec_with_full_attention() -> None:
    """Two models of equal weights: the fields count as long as their values do not mean full causal attention."""
    full = tiny("qwen3", sliding_window=None, use_sliding_window=False, max_window_layers=1)
    wide = tiny("qwen3", sliding_window=4096, use_sliding_window=False, max_window_layers=7)
    some = tiny("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=1)
    every = tiny("qwen3", sliding_window=32, use_sliding_window=True, max_window_layers=0)
    assert spec_of(full) == spec_of(wide) == spec_of(tiny("qwen3"))
    assert len({spec_of(model).digest for model in (full, some, every)}) == 3
    field, _, _ = spec_of(full).first_difference(spec_of(some))
    assert field.startswith("config.layer_types")
    crossing = tiny("qwen3", add_cross_attention=True)
    chunked = tiny("qwen3", chunk_size_feed_forward=2)
    acausal = tiny("qwen3")
    acausal.model.layers[0].self_attn.is_causal = False
    for other in (crossing, chunked, acausal):
        assert spec_of(other) != spec_of(full)
        with pytest.raises(UnsupportedError):
            kvkern.patch(other)


def test_raises_publish__dynamic_rope_that_remembers_a_longer_prompt(store: kvkern.Store, doc: list[int]) -> None:
    """Its frequencies depend on what the model has read before: KV of a document must not."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    arguments = {"rope_parameters": rope, "max_position_embeddings": 32}
    model = tiny("llama", **arguments)
    digest = store.publish(model, doc).digest  # by a twin, whose frequencies grow
    assert store.publish(model, doc).digest == digest
    with torch.no_grad():
        model(torch.tensor([doc * 3]))
    assert unnamed_change(model) is None  # a reader may go on
    store.open(digest, model)
    with pytest.raises(UnsupportedError, match="rotary_emb has the frequencies of an earlier prompt of 210 tokens"):
        store.publish(model, doc)
    model.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(UnsupportedError, match=r"rotary_emb\.inv_freq differs from its configuration's"):
        store.open(digest, model)
    fresh = tiny("llama", **arguments)
    assert store.publish(fresh, doc, attention="model").tokens == len(doc)


def test_open__threads_leave_torchs_initialisation_alone(store: kvkern.Store, doc: list[int]) -> None:
    """What a configuration builds is built without a switch that holds for the whole process."""
    model = tiny("qwen3", num_hidden_layers=12)
    digest = store.publish(model, doc).digest
    before = (nn.init.normal_, PreTrainedModel.init_weights, torch.get_default_dtype(), torch.get_rng_state())
    seen = []

    def read() -> None:
        as_configured._expected_of.cache_clear()
        store.open(digest, model)
        seen.append((nn.init.normal_, PreTrainedModel.init_weights, torch.get_default_dtype()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    built = [nn.Linear(64, 64).weight.std().item() for _ in range(50)]
    for thread in threads:
        thread.join()
    assert set(seen) == {before[:3]} and len(seen) == 8
    assert all(0.05 < std < 0.1 for std in built)
    state = torch.get_rng_state()
    as_configured._expected_of.cache_clear()
    store.open(digest, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_raises_open__a_tensor_class_without_memory_is_no_segmentation_fault(store: kvkern.Store, doc) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny("qwen3")
    digest = store.publish(model, doc).digest
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight.detach()
    projection.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    with pytest.raises((UnsupportedError, RuntimeError, SpecMismatchError)):
        store.open(digest, model)


def test_raises_open__a_builtin_function_in_the_place_of_another(store: kvkern.Store, doc: list[int]) -> None:
    model = tiny("qwen3", hidden_act="gelu")
    digest = store.publish(model, doc).digest
    model.model.layers[0].mlp.act_fn.act = torch.relu
    with pytest.raises(UnsupportedError, match=r"act_fn\.act is <built-in"):
        store.open(digest, model)
