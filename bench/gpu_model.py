"""The part `model` of bench/gpu.py: contract part B on the device. Bits of operations, of a document, and times."""

from __future__ import annotations

import hashlib
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

import kvkern
from kvkern import operations
from kvkern.model_patch.computing import prefill
from kvkern.model_patch.register import under_contract
from kvkern.tables import RopeTable
from tests.support.models import small_qwen3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

LINEAR = [(9728, 2560), (2560, 9728), (4096, 2560), (1024, 2560), (576, 1536), (65, 1030)]
ROWS = (1, 4, 65, 1000)
STEPS = 24
MORE_THAN_A_CACHE = 200 << 20
"""Bytes of weights to rotate through."""


def rows(device: torch.device, seconds: Callable[[list[Callable[[], object]]], float]) -> Iterator[dict[str, Any]]:
    """Yield the operations' bits, a document's digests, and on a GPU the times of Qwen3-4B.

    Args:
        device: a GPU, or the CPU for Triton's interpreter and tiny shapes.
        seconds: takes calls, returns the median time of one.
    """
    is_gpu = device.type == "cuda"
    yield from linear_bits(device, LINEAR if is_gpu else [(40, 70)], ROWS if is_gpu else (1, 5), seconds)
    yield from elementwise_bits(device, 1000 if is_gpu else 3, 2560 if is_gpu else 64)
    yield document(device, 1050 if is_gpu else 70)
    if is_gpu:
        yield from times(device, 3774, seconds)


def linear_bits(
    device: torch.device,
    shapes: list[tuple[int, int]],
    counts: tuple[int, ...],
    seconds: Callable[[list[Callable[[], object]]], float],
) -> Iterator[dict[str, Any]]:
    """Compare Linear in Triton with C, and time it."""
    for out, inputs in shapes:
        weight = operations.to_k_major(random(out, inputs))
        there = operations.to_k_major(weight.to(device))
        count_of = min(64, MORE_THAN_A_CACHE // weight.nbytes) if device.type == "cuda" and out % 2 == 0 else 1
        copies = [there.t().clone().t() for _ in range(max(1, count_of))]
        for count in counts:
            x = random(count, inputs, seed=count)
            moved = x.to(device)
            differ = differing(operations.linear(moved, there, path="triton"), operations.linear(x, weight, path="c"))
            spent_s = seconds([
                lambda moved=moved, there=there: operations.linear(moved, there, path="triton") for there in copies
            ])  # fmt: skip
            work = {"event_us": spent_s * 1e6, "gbps": weight.nbytes / spent_s / 1e9}
            yield {"cell": f"linear-M{count}-N{out}-K{inputs}", "differ": differ, **work,
                   "tflops": 2 * count * out * inputs / spent_s / 1e12}  # fmt: skip


def elementwise_bits(device: torch.device, count: int, width: int) -> Iterator[dict[str, Any]]:
    """Compare RMSNorm, SiLU and RoPE in Triton with the CPU's."""
    x, weight, up = random(count, width), random(width), random(count, width, seed=1)
    table = RopeTable(*(random(2 * count, 32, seed=seed) for seed in (2, 3)))
    heads, positions = random(1, 4, count, 64, seed=4), torch.arange(count)[None] + 1
    there = RopeTable(table.cos.to(device), table.sin.to(device))
    pairs = {
        "norm": (
            operations.rms_norm(x.to(device), weight.to(device), 1e-6, path="triton"),
            operations.rms_norm(x, weight, 1e-6),
        ),
        "silu-times": (
            operations.silu_times(x.to(device), up.to(device), path="triton"),
            operations.silu_times(x, up),
        ),
        "rotary": (
            operations.rotary(heads.to(device), positions.to(device), there, path="triton"),
            operations.rotary(heads, positions, table),
        ),
    }
    for name, (ours, expected) in pairs.items():
        yield {"cell": name, "differ": differing(ours, expected), "compared": expected.numel()}


def document(device: torch.device, tokens: int) -> dict[str, Any]:
    """Compare a document's KV, and the logits of greedy steps attached to it, with the CPU's: small Qwen3."""
    subject = small_qwen3()
    model, ids = subject.model, torch.tensor([subject.doc(tokens)])
    found = []
    with tempfile.TemporaryDirectory() as root:
        store = kvkern.Store(root)
        digest = store.publish(model, ids, producer="contract").digest
        try:
            for place in ("cpu", device):
                model.to(place)
                with under_contract(model):
                    kv = prefill(model, ids)
                kvkern.patch(model, scope="model")
                with store.open(digest, model) as prefix:
                    out = model.generate(
                        **prefix.prepare(subject.question(24)), max_new_tokens=STEPS, do_sample=False,
                        output_logits=True, return_dict_in_generate=True,
                    )  # fmt: skip
                kvkern.unpatch(model)
                found.append((digest_of(*kv), digest_of(*out.logits)))
        finally:
            model.to("cpu")
    (cpu_kv, cpu_logits), (kv_digest, logits) = found
    return {
        "cell": f"document-{subject.name}-P{tokens}+24+{STEPS}", "differ": int(found[0] != found[1]),
        "kv": kv_digest, "kv_cpu": cpu_kv, "logits": logits, "logits_cpu": cpu_logits,
    }  # fmt: skip


def times(
    device: torch.device, tokens: int, seconds: Callable[[list[Callable[[], object]]], float]
) -> Iterator[dict[str, Any]]:
    """Time prefill and a decode step of Qwen3-4B's true configuration, weights random."""
    model = qwen3_4b(device)
    ids = torch.randint(1000, model.config.vocab_size, (1, tokens))
    there = ids.to(device)

    def read() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=there, past_key_values=cache, logits_to_keep=1)
        return cache

    yield {"cell": f"prefill-sdpa-P{tokens}", "seconds": few(read, device)}
    with under_contract(model):
        yield {"cell": f"prefill-contract-P{tokens}", "seconds": few(read, device)}
        cache, token = read(), there[:, :1]

        def step() -> None:
            with torch.inference_mode():
                model(input_ids=token, past_key_values=cache)
            cache.crop(-1)

        yield {"cell": f"decode-contract-P{tokens}-dynamic-cache", "event_us": seconds([step]) * 1e6}


def qwen3_4b(device: torch.device) -> PreTrainedModel:
    """Build Qwen3-4B with random weights on the device: 8 GB."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, max_position_embeddings=40960,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device), no_init_weights():
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    model.tie_weights()
    return model.eval()


def few(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of three runs after one."""
    run()
    spent = []
    for _ in range(3):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(device)
        spent.append(before.elapsed_time(after) / 1e3)
    return spent


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal bf16 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def digest_of(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of several tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def differing(ours: Tensor, expected: Tensor) -> int:
    """Count differing words."""
    return int((ours.cpu().contiguous().view(torch.int16) != expected.contiguous().view(torch.int16)).sum())
