"""Scope "model": complete, reversible, and refused by name for what the contract does not cover."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

import kvkern
from kvkern import operations
from kvkern.contract import CONTRACT_ID, KNOWN_ROPE_TABLES, SILU_TABLE_SHA256
from kvkern.errors import IntegrityError, LayoutError, SpecMismatchError, UnsupportedError
from kvkern.model_patch import rope, whole
from kvkern.model_patch.identity import spec_of
from kvkern.model_patch.register import under_contract
from kvkern.model_patch.rope import rope_table
from kvkern.model_patch.store import Store
from kvkern.probe import Probe
from kvkern.tables import RopeTable
from kvkern.weights import model_weights_digest
from tests.model_patch.conftest import tiny
from tests.support.bits import differing
from tests.support.models import small_qwen3
from tests.support.stock import PROBE, needs_stock_order


@pytest.fixture(autouse=True)
def trusted_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust RoPE tables that a host of another order has made: nobody has listed those of tiny models."""
    monkeypatch.setattr(rope, "stock_order", lambda: Probe(True, "taken for granted by this test"))


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits


def test_scope__every_module_that_computes_is_under_the_contract(model: PreTrainedModel, doc: list[int]) -> None:
    """Whatever transformers calls is ours, a container, or a gather; found by watching a forward."""
    kvkern.patch(model, scope="model")
    called: set[nn.Module] = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.add(module))
    logits(model, doc)
    ours = {module for module in model.modules() if "forward" in module.__dict__}
    assert ours == {module for module in called if not list(module.children())} - {model.get_input_embeddings()}
    assert {type(m).__name__ for m in called - ours} == {
        type(model).__name__, type(model.model).__name__, "Embedding",
        *(f"{type(model).__name__.removesuffix('ForCausalLM')}{part}" for part in ("Attention", "MLP", "DecoderLayer")),
    }  # fmt: skip


def test_scope__patch_and_unpatch_leave_everything_as_it_was(model: PreTrainedModel, doc: list[int]) -> None:
    before, digest = logits(model, doc), model_weights_digest(model)
    names = {name: (tuple(x.shape), x.stride(), x.is_contiguous()) for name, x in model.state_dict().items()}
    for scopes in (("model",), ("attention", "model"), ("model", "attention"), ("model", "model")):
        for scope in scopes:
            kvkern.patch(model, scope=scope)
        assert model_weights_digest(model) == digest, "the same weights, laid out anew"
        kvkern.unpatch(model)
        kvkern.unpatch(model)
        assert model.config._attn_implementation == "eager"
        assert not [module for module in model.modules() if "forward" in module.__dict__]
        assert names == {n: (tuple(x.shape), x.stride(), x.is_contiguous()) for n, x in model.state_dict().items()}
        assert differing(logits(model, doc), before) == 0


def test_scope__under_contract_ends_with_an_error_too(model: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), under_contract(model):
        assert whole.is_entered(model)
        1 / 0  # noqa: B018
    assert not whole.is_entered(model) and model.config._attn_implementation == "eager"


def test_scope__weights_are_laid_out_and_not_doubled(model: PreTrainedModel) -> None:
    sizes = {name: x.untyped_storage().nbytes() for name, x in model.state_dict().items()}
    kvkern.patch(model, scope="model")
    assert sizes == {name: x.untyped_storage().nbytes() for name, x in model.state_dict().items()}
    assert all(operations.is_k_major(m.weight) for m in model.modules() if type(m) is nn.Linear)
    ids = torch.tensor([[3, 5]])
    assert differing(model.get_input_embeddings()(ids)[0], model.get_input_embeddings().weight[ids[0]]) == 0


@needs_stock_order
def test_bits_scope__a_short_document_has_stocks_bits(model: PreTrainedModel, doc: list[int]) -> None:
    before = logits(model, doc)
    kvkern.patch(model, scope="model")
    assert differing(logits(model, doc), before) == 0


def test_bits_scope__generate_in_a_ragged_batch_is_each_row_alone(model: PreTrainedModel, store: Store, doc) -> None:
    kvkern.patch(model, scope="model")
    prefix = store.open(store.publish(model, doc, producer="contract").digest, model)
    rows = [[3], [4, 5, 6, 7, 8], [9, 10]]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**prefix.prepare(rows), **options)
    for i, row in enumerate(rows):
        alone = model.generate(**prefix.prepare(row), **options)
        assert [differing(a[i : i + 1], b) for a, b in zip(together.logits, alone.logits, strict=True)] == [0] * 6
        cold = model.generate(input_ids=torch.tensor([doc + row]), **options)
        assert [differing(a, b) for a, b in zip(alone.logits, cold.logits, strict=True)] == [0] * 6


BAD = {
    "bias": (lambda: tiny("qwen3", attention_bias=True), r"layers\.0\.self_attn\.q_proj: a Linear with a bias"),
    "MLP bias": (lambda: tiny("llama", mlp_bias=True), r"layers\.0\.mlp\.gate_proj: a Linear with a bias"),
    "activation": (lambda: tiny("qwen3", hidden_act="gelu"), r"mlp\.act_fn: a GELUActivation"),
    "norm width": (lambda: tiny("llama", hidden_size=80, num_attention_heads=5, num_key_value_heads=1, head_dim=16),
                   r"input_layernorm: width 80"),
    "dynamic RoPE": (lambda: tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
                     "RoPE type 'dynamic'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_raises_scope__names_what_the_contract_does_not_cover(name: str, store: Store, doc: list[int]) -> None:
    make, message = BAD[name]
    model = make()
    for call in (
        lambda: kvkern.patch(model, scope="model"),
        lambda: store.publish(model, doc, producer="contract"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            call()
        assert not whole.is_entered(model) and model.config._attn_implementation == "eager"
    assert store.publish(model, doc).tokens == len(doc), "producer stock still works for it"


def test_raises_scope__a_foreign_module_is_named(doc: list[int]) -> None:
    class Quantised(nn.Linear):
        pass

    model = tiny()
    model.model.layers[1].mlp.up_proj.__class__ = Quantised
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj: a Quantised is outside the numeric contract"):
        kvkern.patch(model, scope="model")
    with pytest.raises(UnsupportedError, match="scope 'all' is not available"):
        kvkern.patch(tiny(), scope="all")


def test_raises_scope__a_position_beyond_the_table() -> None:
    model = tiny(max_position_embeddings=8)
    kvkern.patch(model, scope="model")
    logits(model, [1] * 8)
    with pytest.raises(UnsupportedError, match="positions 0 to 8 are not all in the RoPE table's 0 to 7"):
        logits(model, [1] * 9)


class Custom:
    """What changes a model behind its classes' backs."""

    @staticmethod
    def forward(model: PreTrainedModel) -> None:
        module = model.model.layers[0].mlp.up_proj
        module.forward = lambda x: nn.functional.linear(x, module.weight) * 2

    @staticmethod
    def hook(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 2)

    @staticmethod
    def eps(model: PreTrainedModel) -> None:
        model.model.norm.variance_epsilon = 1e-3

    @staticmethod
    def scaling(model: PreTrainedModel) -> None:
        model.model.layers[0].self_attn.scaling = 0.5

    @staticmethod
    def frequencies(model: PreTrainedModel) -> None:
        model.to(torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in vars(Custom) if not name.startswith("_")])
def test_raises_scope__a_model_that_was_changed_is_refused_and_left_alone(name: str, store: Store, doc) -> None:
    model = tiny()
    getattr(Custom, name)(model)
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(UnsupportedError, match=r"outside the numeric contract|cast them"):
        store.publish(model, doc, producer="contract")
    assert before == [dict(module.__dict__) for module in model.modules()] and store.ls() == []


def test_raises_scope__what_comes_after_the_patch_is_noticed(store: Store, doc: list[int]) -> None:
    model = tiny()
    kvkern.patch(model, scope="model")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="attention is 'sdpa' on a model of scope 'model'"):
        store.publish(model, doc, producer="contract")
    kvkern.patch(model, scope="model")
    model.model.layers[0].mlp.up_proj = nn.Linear(96, 96, bias=False, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"up_proj has come after kvkern\.patch"):
        store.publish(model, doc, producer="contract")
    model.train()
    with pytest.raises(UnsupportedError, match="training"):
        logits(model, doc)


def test_scope__a_copy_of_a_patched_model_computes_with_its_own_weights(doc: list[int]) -> None:
    model = tiny()
    kvkern.patch(model, scope="model")
    copied, fresh = copy.deepcopy(model), tiny()
    for changed in (copied, fresh):
        for parameter in changed.parameters():
            parameter.data.mul_(0.5)
    kvkern.patch(fresh, scope="model")
    assert differing(logits(copied, doc), logits(fresh, doc)) == 0
    kvkern.unpatch(copied)
    assert whole.is_entered(model), "the original stays patched"


def test_scope__a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny(), iter(range(100))
    strides = [parameter.stride() for parameter in model.parameters()]

    def fails(weight: torch.Tensor) -> torch.Tensor:
        if next(calls) == 4:
            raise MemoryError
        return weight.t().contiguous().t()

    monkeypatch.setattr(operations, "to_k_major", fails)
    with pytest.raises(MemoryError):
        kvkern.patch(model, scope="model")
    assert strides == [parameter.stride() for parameter in model.parameters()]
    assert not whole.is_entered(model) and model.config._attn_implementation == "eager"


def test_scope__threads_that_publish_one_model_wait_for_each_other(store: Store, doc: list[int]) -> None:
    model = tiny()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.publish(model, doc * 4, producer="contract").digest, range(8)))
    assert len(set(found)) == 1 and not whole.is_entered(model)


def test_raises_audit__another_model_and_foreign_tokens(store: Store, doc: list[int]) -> None:
    model, other = tiny(), tiny()
    other.model.norm.weight.data.mul_(2)
    prefix = store.open(store.publish(model, doc, producer="contract").digest, model)
    with pytest.raises(SpecMismatchError, match="weights"):
        kvkern.audit(prefix, other)
    k, v = torch.randn(2, 2, 2, 5, 32).bfloat16()
    forged = store.open(store.put(prefix.spec, [1, 2, 70000, 3, 4], k, v).digest, model)
    with pytest.raises(IntegrityError, match="70000 at token 2 is beyond the model's vocabulary of 64"):
        kvkern.audit(forged, model)


def test_match__a_contract_document_is_no_obstacle_for_other_models(store: Store, doc: list[int]) -> None:
    store.publish(tiny(), doc, producer="contract")
    stranger = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert store.match([*doc, 3], stranger) is None


# ---- tables ----


def one_unit_off(table: RopeTable) -> RopeTable:
    """What another mathematical library could have made."""
    cos = table.cos.clone()
    cos.view(torch.int16)[5, 5] ^= 1
    return RopeTable(cos, table.sin)


@pytest.mark.parametrize("name", ["../../victim", 5, "0" * 63, None])
def test_rope__a_hostile_name_of_a_table_reaches_no_file(name: object, store: Store, tmp_path: Path, doc) -> None:
    victim = tmp_path / "victim.bin"
    victim.write_bytes(b"precious")
    model = tiny()
    info = {} if name is None else {"rope_table": name}
    spec = replace(spec_of(model, producer="contract"), producer_info=info)
    k, v = torch.randn(2, 2, 2, 5, 32).bfloat16()
    digest = store.put(spec, [1, 2, 3, 4, 5], k, v).digest
    with pytest.raises(LayoutError, match="64 lower-case hex digits"):
        store.rope_table(digest)
    assert store.verify().ok and victim.read_bytes() == b"precious"


@needs_stock_order
def test_rope__the_listed_tables_are_those_that_this_host_makes() -> None:
    """Those of 131,072 positions and more are left out: they take long."""
    small = {"max_position_embeddings": 8192, "head_dim": 64}
    smollm2 = {"rope_type": "default", "rope_theta": 100_000.0}
    models = {
        "SmolLM2-135M": tiny("llama", **small, rope_parameters=smollm2),
        "the small Qwen3 of the tests": small_qwen3().model,
        "Qwen3-0.6B, 1.7B, 4B, 8B, 14B": tiny(head_dim=128, max_position_embeddings=40960, rope_theta=1e6),
    }
    for name, model in models.items():
        assert KNOWN_ROPE_TABLES.get(rope_table(model).digest) == name


def test_rope__a_host_of_another_order_takes_listed_or_given_tables_only(
    monkeypatch: pytest.MonkeyPatch, store: Store, doc: list[int]
) -> None:
    model = tiny()
    digest = store.publish(model, doc, producer="contract").digest
    given = one_unit_off(store.rope_table(digest))
    for module in (rope, operations):
        monkeypatch.setattr(module, "stock_order", lambda: Probe(False, "another order"))
    with pytest.raises(UnsupportedError, match=r"another order\. Take the publisher's: .*rope_table=store.rope_table"):
        kvkern.patch(model, scope="model")
    kvkern.patch(model, scope="model", rope_table=given)
    other = store.publish(model, doc, producer="contract").digest
    assert other != digest, "another table is another document"
    with store.open(other, model) as prefix:
        assert kvkern.audit(prefix, model).ok, "everything in C"
    kvkern.unpatch(model)
    known = small_qwen3().model
    kvkern.patch(known, scope="model")
    kvkern.unpatch(known)
    for wrong, message in (
        (RopeTable(given.cos[:10], given.sin[:10]), r"rope_table\.cos is \(10, 16\)"),
        (RopeTable(given.cos, given.sin.float()), r"rope_table\.sin is .* torch\.float32"),
        (RopeTable(torch.ones_like(given.cos), torch.zeros_like(given.sin)), "Do not trust its publisher"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            kvkern.patch(model, scope="model", rope_table=wrong)


def test_rope__a_model_on_another_device_has_the_table_of_the_cpu() -> None:
    """Another device's powers and cosines are rounded in another way."""
    assert rope_table(tiny().to("meta")).digest == rope_table(tiny()).digest


def test_rope__another_table_is_another_spec(store: Store, doc: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    digest = store.publish(model, doc, producer="contract").digest
    table = store.rope_table(digest)
    other = tiny()
    with pytest.raises(UnsupportedError, match="1 of .* entries differ"), monkeypatch.context() as follows:
        follows.setattr(rope, "stock_order", lambda: Probe(True, "the contract's order"))
        kvkern.patch(other, scope="model", rope_table=one_unit_off(table))
    for module in (rope, operations):
        monkeypatch.setattr(module, "stock_order", lambda: Probe(False, "another order"))
    kvkern.patch(other, scope="model", rope_table=one_unit_off(table))
    with pytest.raises(SpecMismatchError, match=rf"producer_info\.rope_table.*{table.digest}"):
        store.open(digest, other)
    kvkern.unpatch(other)
    kvkern.patch(other)
    assert store.open(digest, other).tokens == len(doc), "attention alone needs no table"
    stored = store.open(digest, model).spec.producer_info
    assert stored == {"contract": CONTRACT_ID, "rope_table": table.digest, "silu_table": SILU_TABLE_SHA256}


def test_rope__a_damaged_table_is_refused_and_healed_by_publishing(store: Store, doc: list[int]) -> None:
    model = tiny()
    digest = store.publish(model, doc, producer="contract").digest
    path = next((Path(store.blocks.root) / "tables").iterdir())
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    (defect,) = store.verify().defects
    assert defect.path == path and "SHA-256" in defect.problem and "quarantine" in defect.problem
    with pytest.raises(IntegrityError, match="the table is missing"):
        store.rope_table(digest)
    assert store.publish(model, doc, producer="contract").digest == digest
    assert store.rope_table(digest).digest == rope_table(model).digest and store.verify().ok
    stock = store.publish(model, doc).digest
    with pytest.raises(LayoutError, match="it has no RoPE table"):
        store.rope_table(stock)


def test_rope__llama3_scaling_is_covered(doc: list[int]) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    model = tiny("llama", rope_parameters=scaling, max_position_embeddings=512)
    before = logits(model, doc)
    kvkern.patch(model, scope="model")
    if PROBE.follows:
        assert differing(logits(model, doc), before) == 0
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.config, LlamaConfig)
