"""The way that a model on a GPU goes, on a CPU: an arena instead of mapped shards, Triton in its interpreter."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import kvkern
from kvkern import attention, view
from kvkern.kernels import fast
from kvkern.layout import map_pool, upload
from kvkern.model_patch import attention as attention_module
from kvkern.model_patch import store as store_module
from kvkern.model_patch.store import Prefix, Store
from tests.model_patch.conftest import tiny
from tests.support.bits import differing, sha256


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand for a GPU: the pool is uploaded, and every call goes to Triton."""
    for module in (attention, view):
        monkeypatch.setattr(module, "is_native", lambda _: False)
    monkeypatch.setattr(store_module, "map_pool", lambda shards: upload(map_pool(shards), torch.device("cpu")))


def answer(model: PreTrainedModel, prefix: Prefix) -> list[torch.Tensor]:
    """A ragged batch, two steps of each row."""
    inputs = prefix.prepare([[3, 4], [5]])
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return [*out.logits, out.sequences]


def noted_workspaces(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Note every work space that a cache makes."""
    made: list[torch.Tensor] = []
    make = attention_module.new_workspace
    monkeypatch.setattr(attention_module, "new_workspace", lambda *a, **o: made.append(make(*a, **o)) or made[-1])
    return made


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("llama", marks=pytest.mark.long)])
def test_bits_device__an_arena_and_triton_give_what_mapped_shards_and_c_give(
    kind: str, store: Store, doc: list[int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(kind)
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    with store.open(digest, model) as prefix:
        expected = answer(model, prefix)
    request.getfixturevalue("as_on_a_device")
    made = noted_workspaces(monkeypatch)
    with store.open(digest, model) as prefix:
        assert prefix.pool.anchor.is_contiguous() and prefix.pool.anchor.dim() == 1, "one arena"
        assert [sha256(x) for x in answer(model, prefix)] == [sha256(x) for x in expected]
    assert len(made) == 2 and made[0].numel(), "one work space for the layers of the question, one for the next token's"


def test_bits_device__an_uploaded_pool_holds_every_block(store: Store) -> None:
    model = tiny()
    ids = torch.randint(2, 64, (600,)).tolist()
    with store.open(store.publish(model, ids).digest, model) as prefix:
        arena = upload(prefix.pool, torch.device("cpu"))
        for shard, (k, v) in zip(prefix.document.shards, arena.block_table.tolist(), strict=True):
            assert differing(arena.anchor[k : k + shard.k.numel()].view(shard.k.shape), shard.k) == 0
            assert differing(arena.anchor[v : v + shard.v.numel()].view(shard.v.shape), shard.v) == 0


def test_raises_device__a_model_that_moved(store: Store, doc: list[int]) -> None:
    model = tiny()
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    inputs = store.open(digest, model).prepare([3])
    keys = torch.zeros(1, 2, 1, 32, dtype=torch.bfloat16, device="meta")
    with pytest.raises(kvkern.UnsupportedError, match="keys on meta, the cache is on cpu: the model was moved"):
        inputs["past_key_values"].update(keys, keys, 0)


def test_tokens_fast__a_patched_model_reads_a_prefix_in_one_launch_a_layer(
    store: Store, doc: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widened form of the fast kernel, end to end; the tokens are those of the exact profile."""
    model = tiny(head_dim=64)
    digest = store.publish(model, doc).digest
    kvkern.patch(model)
    with store.open(digest, model) as prefix:
        expected = answer(model, prefix)
    launched: list[str] = []
    runner = type(fast.fast_kernel)
    real = runner.run
    monkeypatch.setattr(runner, "run", lambda self, *a, **o: launched.append(self.fn.__name__) or real(self, *a, **o))
    made = noted_workspaces(monkeypatch)
    kvkern.patch(model, profile="fast")
    with store.open(digest, model) as prefix:
        out = answer(model, prefix)
    assert torch.equal(out[-1], expected[-1]), "other tokens"
    assert (out[0] - expected[0]).abs().max() < 0.1
    assert differing(out[0], expected[0]) > 0, "profile fast has bits of its own: exact has run instead"
    assert launched.count("fast_kernel") == 2 * model.config.num_hidden_layers, "two steps, one launch a layer"
    assert len(made) == 2, "one work space for the layers of the question, one for those of the next token"
    kvkern.unpatch(model)
    assert model.config._attn_implementation == "eager"
