"""What the contract costs: Linear of one row, prefill of the whole model by either path, audit beside publish."""

from __future__ import annotations

import functools
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

import kvkern
from bench.bandwidth import read_variant
from bench.bits import compared
from bench.documents import attend_with, attending
from bench.rotation import READ, REPLAYED, Cell, Variant, replay, rotate
from bench.shapes import PREFIX_TOKENS, SHORT_TOKENS, last_level_cache_bytes
from kvkern import operations
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.register import under_contract
from tests.support.models import smollm2

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor

pytestmark = REPLAYED
WEIGHTS = {"qwen3-4b-gate": (9728, 2560), "qwen3-4b-down": (2560, 9728), "smollm2-lm_head": (49152, 576)}
ROW = (READ, "linear-c", "linear-torch", "linear-stock")
PREFILLS = ("eager-prefill", "sdpa-prefill", "contract-stock-path", "contract-c-path", "contract-publish", "audit-all",
            "audit-32")  # fmt: skip


@pytest.mark.parametrize("variant", ROW)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear(benchmark: BenchmarkFixture, weight: str, variant: str) -> None:
    replay(benchmark, linear(weight)[variant])


@pytest.mark.parametrize("variant", PREFILLS)
@pytest.mark.parametrize("tokens", (SHORT_TOKENS, PREFIX_TOKENS))
def test_contract_prefill(benchmark: BenchmarkFixture, tokens: int, variant: str) -> None:
    replay(benchmark, contract_prefill(tokens)[variant])


@functools.cache
def linear(name: str) -> dict[str, Cell]:
    """Time one row through a weight that is not in the cache."""
    out, inputs = WEIGHTS[name]
    generator = torch.Generator().manual_seed(0)
    count = max(2, -(-3 * last_level_cache_bytes() // (2 * out * inputs)))
    stock = [torch.randn(out, inputs, generator=generator).bfloat16() for _ in range(count)]
    ours = [operations.to_k_major(weight) for weight in stock]
    x = torch.randn(1, inputs, generator=generator).bfloat16()
    info = {"shape": f"M1-N{out}-K{inputs}", "bytes_moved": 2 * out * inputs}
    oracle = [F.linear(x.expand(2, -1), weight)[:1] for weight in stock]

    def bits(outputs: list[Tensor], *, claim: bool) -> dict[str, Any]:
        return compared(zip(outputs, oracle, strict=True), claim=claim)

    def by(path: str, weights: list[Tensor], slot: int) -> Tensor:
        return operations.linear(x, weights[slot % count], path=path)

    own = bits([by("c", ours, i) for i in range(count)], claim=True)
    one = bits([F.linear(x, weight) for weight in stock], claim=False)
    return rotate(
        f"linear/{name}",
        [
            read_variant(),
            Variant("linear-c", functools.partial(by, "c", ours), info=info | own),
            Variant("linear-torch", functools.partial(by, "torch", stock), info=info | bits(oracle, claim=True)),
            Variant("linear-stock", lambda slot: F.linear(x, stock[slot % count]), info=info | one),
        ],
        rounds=40,
        warmup=3,
    )


@functools.cache
def contract_prefill(tokens: int) -> dict[str, Cell]:
    """Time stock's prefills, the contract's by both paths, and what publishing and auditing cost."""
    subject = smollm2()
    model, ids = subject.model, torch.tensor([subject.doc(tokens)])
    resolve = operations.resolve_linear
    folder = tempfile.TemporaryDirectory()
    store = kvkern.Store(folder.name)
    with attending(model, "eager"), pytest.MonkeyPatch.context() as patch:
        digest = store.publish(model, ids, producer="contract").digest
        prefix = store.open(digest, model)
        with under_contract(model):
            oracle = prefill(model, ids)
        kept: dict[str, Any] = {}

        def compute(_: int) -> None:
            kept["kv"] = prefill(model, ids)

        def contract(_: int) -> None:
            with under_contract(model):
                compute(0)

        def c_only(_: int) -> None:
            with patch.context() as only:
                only.setattr(operations, "resolve_linear", lambda rows, weight, **_: resolve(rows, weight, path="c"))
                contract(0)

        def publish(_: int) -> None:
            with tempfile.TemporaryDirectory() as root:
                kvkern.Store(root).publish(model, ids, producer="contract")

        info = {"shape": f"{subject.name}-P{tokens}"}
        stock = {name: functools.partial(attend_with, model, name) for name in ("eager", "sdpa")}
        variants = [
            Variant("eager-prefill", compute, stock["eager"], dict(info)),
            Variant("sdpa-prefill", compute, stock["sdpa"], dict(info)),
            Variant("contract-stock-path", contract, stock["eager"], dict(info)),
            Variant("contract-c-path", c_only, stock["eager"], dict(info)),
            Variant("contract-publish", publish, stock["eager"], dict(info)),
            Variant("audit-all", lambda _: kvkern.audit(prefix, model), stock["eager"], dict(info)),
            Variant("audit-32", lambda _: kvkern.audit(prefix, model, 32), stock["eager"], dict(info)),
        ]
        for variant in variants[:4]:
            variant.setup()
            variant.run(0)
            variant.info.update(compared(zip(kept["kv"], oracle, strict=True), claim=variant.run is not compute))
        cells = {}
        slow = variants[:1] if tokens == PREFIX_TOKENS else []
        for part, rounds in ((slow, 1), (variants[len(slow) :], 3)):
            cells |= rotate(f"contract-prefill/{tokens}", part, rounds=rounds, warmup=0) if part else {}
    folder.cleanup()
    return cells
