"""open(check="recompute"): honest documents are accepted under either rule, KV of another computation is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import kvkern
from kvkern import KVMismatchError
from kvkern.model_patch import identity
from kvkern.model_patch import recompute as rules
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.identity import spec_of
from kvkern.model_patch.recompute import bit_rule_obstacle, compare_distances
from kvkern.model_patch.store import Prefix
from kvkern.probe import Probe
from tests.model_patch.conftest import SIZES, tiny
from tests.support.models import smollm2
from tests.support.stock import needs_stock_order


@pytest.fixture(autouse=True)
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX has two orders of sums and falls back on distances; these tests are about the others."""
    for module in (identity, rules):
        monkeypatch.setattr(module, "cpu_isa", lambda: "avx512_bf16")


def ids_of(tokens: int) -> list[int]:
    return torch.randint(2, 64, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


@functools.cache
def mixture() -> PreTrainedModel:
    torch.manual_seed(5)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


def served(store: kvkern.Store, digest: str, model: PreTrainedModel, tokens: int) -> Prefix:
    """A document of which the first tokens are served, as match() does."""
    return Prefix(store.open(digest, model).document, model, tokens)


@needs_stock_order
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(
    ("tokens", "of"), [(1, 1), (1, 300), (2, 2), (15, 15), (64, 64), (65, 65), (65, 300), (128, 128), (1100, 1300)]
)
def test_bits_recompute__an_honest_document(kind: str, tokens: int, of: int, store: kvkern.Store) -> None:
    """Published by eager itself and by kvkern; opened by a model of sdpa, and by a patched one."""
    ids, model = ids_of(of), tiny(kind)
    digests = {store.publish(model, ids, attention="model").digest, store.publish(model, ids).digest}
    model.set_attn_implementation("sdpa")
    digests.add(store.publish(model, ids).digest)
    for patched in (False, True):
        if patched:
            kvkern.patch(model)
        for digest in digests:
            found = rules.recompute(served(store, digest, model, tokens), model)
            assert (found.rule, found.tokens, found.distance) == ("bits", min(tokens, 128), 0.0)
    assert model.config._attn_implementation == "kvkern"


@needs_stock_order
@pytest.mark.parametrize("of", [1100, pytest.param(3000, marks=pytest.mark.long)])
def test_bits_recompute__800_tokens_of_a_longer_document(of: int, store: kvkern.Store) -> None:
    """The run rule is that of the document's own prefill: 1,024 keys, though 800 are served."""
    subject = smollm2()
    digest = store.publish(subject.model, subject.doc(of)).digest
    found = rules.recompute(served(store, digest, subject.model, 800), subject.model)
    assert found.rule == "bits" and "runs of 1024" in found.reason
    prefix = store.match([*subject.doc(800), 1, 2, 3], subject.model, check="recompute")
    assert prefix.tokens == 800 and prefix.recomputed == found


@needs_stock_order
def test_raises_recompute__one_flipped_bit_at_either_end(store: kvkern.Store) -> None:
    model, ids = tiny("qwen3"), ids_of(300)
    k, v = prefill(model, torch.tensor([ids]))
    for token in (0, 63, 236, 299):
        for part in (k, v):
            part.view(torch.int16)[1, 1, token, 5] ^= 1
            digest = store.put(spec_of(model), ids, k, v).digest
            store.open(digest, model)
            with pytest.raises(KVMismatchError, match=f"layer 1 at token {token}, head 1, channel 5"):
                store.open(digest, model, check="recompute")
            part.view(torch.int16)[1, 1, token, 5] ^= 1
    assert store.open(store.put(spec_of(model), ids, k, v).digest, model, check="recompute").recomputed.rule == "bits"


@needs_stock_order
def test_raises_recompute__the_wrong_run_rule(store: kvkern.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the run rule: 1,300 tokens recomputed in runs of 512 differ."""
    model, ids = tiny("qwen3"), ids_of(1300)
    digest = store.publish(model, ids).digest
    assert store.open(digest, model, check="recompute").recomputed.rule == "bits"
    monkeypatch.setattr(rules, "stock_key_run", lambda rows, columns: 512)
    with pytest.raises(KVMismatchError):
        store.open(digest, model, check="recompute")


def test_recompute__a_contract_document_has_its_bits_on_every_host(
    store: kvkern.Store, doc: list[int], trusted_tables
) -> None:
    model = tiny("qwen3")
    digest = store.publish(model, doc, producer="contract").digest
    assert store.open(digest, model, check="recompute").recomputed.rule == "bits"
    k, v = store.open(digest, model).document.kv()
    k.view(torch.int16)[0, 0, 3, 0] ^= 1
    digest = store.put(store.open(digest, model).spec, doc, k, v).digest
    with pytest.raises(KVMismatchError, match="layer 0 at token 3"):
        store.open(digest, model, check="recompute")


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 300])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "kvkern"])
def test_distance_recompute__a_mixture_of_experts(attention: str, tokens: int, store: kvkern.Store) -> None:
    """A token's bits depend on its company there."""
    model = mixture()
    model.set_attn_implementation("eager" if attention == "kvkern" else attention)
    digest = store.publish(model, ids_of(tokens), attention="exact" if attention == "kvkern" else "model").digest
    found = store.open(digest, model, check="recompute").recomputed
    assert found.rule == "distance" and found.distance <= found.limit


def test_recompute__the_bit_rule_stands_on_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    spec = spec_of(model)

    def obstacle(**info) -> str | None:
        return bit_rule_obstacle(dataclasses.replace(spec, producer_info={**spec.producer_info, **info}), model)

    for info, named in (
        ({"attn_implementation": "sdpa"}, "'sdpa'"),
        ({"attn_implementation": "kvkern_contract"}, "'kvkern_contract'"),
        ({"compiled": True}, "compiled"),
        ({"device": "NVIDIA H100"}, "NVIDIA H100"),
        ({"torch": "2.11.0"}, "2.11.0"),
    ):
        assert named in obstacle(**info)
    assert "mixture of experts" in bit_rule_obstacle(spec_of(mixture()), mixture())
    assert "another dtype than bfloat16" in bit_rule_obstacle(spec, tiny("qwen3").float())
    for probe in (Probe(True, "as the contract"), Probe(False, "stock adds otherwise here")):
        monkeypatch.setattr(rules, "stock_order", lambda probe=probe: probe)
        assert obstacle() == (None if probe.follows else probe.reason)


@needs_stock_order
def test_recompute__under_amx_bits_or_else_distance(store: kvkern.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's order hangs on a setting that documents do not record, so bits that differ prove nothing there."""
    for module in (identity, rules):
        monkeypatch.setattr(module, "cpu_isa", lambda: "amx_bf16")
    model, ids = tiny("qwen3"), ids_of(300)
    assert store.open(store.publish(model, ids).digest, model, check="recompute").recomputed.rule == "bits"
    k, v = prefill(model, torch.tensor([ids]))
    k.view(torch.int16)[1, 1, 7, 5] ^= 1
    digest = store.put(spec_of(model), ids, k, v).digest
    found = store.open(digest, model, check="recompute").recomputed
    assert found.rule == "distance" and "AMX" in found.reason
    digest = store.put(spec_of(model), ids, k * 1.25, v).digest
    with pytest.raises(KVMismatchError, match="relative distance of 0.2"):
        store.open(digest, model, check="recompute")


def windowed(model: PreTrainedModel, ids: list[int], window: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(len(ids))
    near = (place[:, None] - place < window) & (place[:, None] >= place)
    mask = torch.where(near, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()[None, None]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return tuple(torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))


@pytest.fixture(scope="module")
def real():
    return smollm2()


@pytest.fixture
def put(real, store: kvkern.Store):
    spec = spec_of(real.model)

    def published(k: torch.Tensor, v: torch.Tensor) -> Prefix:
        return store.open(store.put(spec, real.doc(k.shape[2]), k, v).digest, real.model)

    return published


def test_distance_recompute__an_honest_document_of_sdpa(real, put) -> None:
    real.model.set_attn_implementation("sdpa")
    try:
        kv = prefill(real.model, torch.tensor([real.doc(400)]))
    finally:
        real.model.set_attn_implementation("eager")
    found = compare_distances(put(*kv), real.model)
    assert 0 < found.distance <= found.limit < 0.1


def test_raises_distance__a_window_of_128(real, put) -> None:
    """Its first 64 tokens are right: only the last ones tell."""
    kv = windowed(real.model, real.doc(400), 128)
    with pytest.raises(KVMismatchError, match=r"tokens 336 to 399, is at a relative distance of 0\.[1-9]"):
        compare_distances(put(*kv), real.model)


def test_raises_distance__other_rope_frequencies(real, put) -> None:
    inv_freq = real.model.model.rotary_emb.inv_freq
    own = inv_freq.clone()
    inv_freq.copy_(10_000.0 ** -(torch.arange(32) / 32))
    try:
        kv = prefill(real.model, torch.tensor([real.doc(400)]))
    finally:
        inv_freq.copy_(own)
    with pytest.raises(KVMismatchError, match=r"K of layer \d+, tokens 1 to 63, .* distance of 0\.[1-9]"):
        compare_distances(put(*kv), real.model)


def test_raises_distance__another_lora_alpha(real, store: kvkern.Store) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'kvkern[dev]'")
    import copy

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(real.model), config).eval()
    ids, spec = real.doc(200), spec_of(real.model)
    digests = []
    for alpha in (64, 8):
        for layer in model.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.scaling["default"] = alpha / 4
        digests.append(store.put(spec, ids, *prefill(model, torch.tensor([ids]))).digest)
    louder, same = (Prefix(store.blocks.get(digest), model) for digest in digests)
    assert compare_distances(same, model).rule == "distance"
    with pytest.raises(KVMismatchError, match="relative distance"):
        compare_distances(louder, model)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
            "factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize("tokens", [100, 128, 129, 300])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_recompute__frequencies_are_those_of_the_documents_own_length(rope, tokens: int, store: kvkern.Store) -> None:
    """64 tokens alone would be rotated by those of 64."""
    longest = 512 if rope is LONGROPE else 128
    for attention in ("eager", "sdpa"):
        model = tiny("llama", rope_parameters=rope, max_position_embeddings=longest)
        model.set_attn_implementation(attention)
        digest = store.publish(model, ids_of(tokens), attention="model").digest
        reader = tiny("llama", rope_parameters=rope, max_position_embeddings=longest)
        store.open(digest, reader, check="recompute")
        half = served(store, digest, reader, tokens // 2)
        rules.recompute(half, reader)


def test_raises_recompute__an_attention_function_that_somebody_has_registered(store: kvkern.Store) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, ids = tiny("qwen3"), ids_of(100)
    digest = store.publish(model, ids).digest
    for name in ("eager", "sdpa", "kvkern"):
        ALL_ATTENTION_FUNCTIONS[name] = lambda *_, **__: None
        try:
            with pytest.raises(kvkern.UnsupportedError, match=f"implementation '{name}' is a function of"):
                store.open(digest, model, check="recompute")
            if name != "sdpa":
                with pytest.raises(kvkern.UnsupportedError, match="is a function of|is not stock eager"):
                    store.publish(model, ids)
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
    store.open(digest, model, check="recompute")
