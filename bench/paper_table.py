"""The table of arXiv 2606.13361 on this machine: prefill from scratch against attach and continue, Qwen3-4B.

`python -m bench.paper_table [--model DIR] [--tokens 255 512 ...]` writes a JSON row after every length;
`python -m bench.paper_table --report` turns the JSON into Markdown and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.initialization import no_init_weights

import kvkern
from bench.shapes import cpu_model
from kvkern.layout import shard
from kvkern.model_patch.identity import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

RESULTS = Path(__file__).parent / "results"
TOKENS = (255, 512, 1024, 2048, 3774)
STEPS = 24
QUESTION = 16


def main() -> None:
    """Run the lengths that are asked for, or write the report."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", help="directory or hub id; the true configuration with random weights if left out")
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--layers", type=int, default=36, help="fewer for a quick look; the row says how many")
    options.add_argument("--out", type=Path, default=RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-paper.json")
    options.add_argument("--report", action="store_true")
    given = options.parse_args()
    if given.report:
        from bench.paper_report import write

        write(given.out)
        return
    model = load(given.model, given.layers)
    ids = torch.randint(1000, model.config.vocab_size, (1, max(given.tokens) + QUESTION), generator=seeded())
    machine = {
        "cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "weights": given.model or "random", "layers": model.config.num_hidden_layers, "steps": STEPS,
        "question_tokens": QUESTION,
    }  # fmt: skip
    prompts = {n: (ids[:, :n], ids[:, -QUESTION:]) for n in given.tokens}
    model.set_attn_implementation("sdpa")
    warm_up(model, ids)
    stock = {n: from_scratch(model, *prompt, f"stock sdpa, {n} tokens") for n, prompt in prompts.items()}
    for run in stock.values():
        del run["kv"]
    kvkern.patch(model, scope="model")
    start = time.perf_counter()
    spec_of(model)
    machine["weights_digest_s"] = time.perf_counter() - start
    warm_up(model, ids)
    rows: list[dict[str, Any]] = []
    for n, prompt in prompts.items():
        rows.append({"tokens": n, **compare(model, *prompt, stock[n])})
        given.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        say(f"{n}: {rows[-1]}")


def warm_up(model: PreTrainedModel, ids: Tensor) -> None:
    """Have everything compiled, loaded and laid out that the first forward would wait for."""
    for tokens in (64, 1):
        forward(model, input_ids=ids[:, :tokens])


def compare(model: PreTrainedModel, document: Tensor, question: Tensor, stock: dict[str, Any]) -> dict[str, Any]:
    """Measure one length: from scratch under the contract, put into a store, attached from each source."""
    n = document.shape[1]
    cold = from_scratch(model, document, question, f"contract, {n} tokens")
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "build") as folder:
        store, spec = kvkern.Store(folder), spec_of(model, producer="contract")
        put_s, done = timed(lambda: store.put(spec, document, *cold.pop("kv")))
        sources = {}
        for source, prepare in {"disk": drop_from_page_cache, "first open": forget, "later open": None}.items():
            if prepare is not None:
                forget()
                prepare(Path(folder))
            load_s, prefix = timed(lambda: store.open(done.digest, model))
            sources[source] = load_s
        say(f"attached, {n} tokens: opens {sources}")
        attached = attach(model, prefix, question)
    out = {
        "payload_bytes": done.payload_bytes,
        "put_s": put_s,
        "load_s": sources,
        "stock": timings(stock),
        "contract": timings(cold),
        "attached": timings(attached),
    }
    for name, other in (("contract", cold), ("stock", stock)):
        out[f"tokens_equal_{name}"] = sum(a == b for a, b in zip(attached["new"], other["new"], strict=True))
        out[f"logits_equal_{name}"] = sum(map(same_bits, attached["logits"], other["logits"]))
    return out


def from_scratch(model: PreTrainedModel, document: Tensor, question: Tensor, what: str) -> dict[str, Any]:
    """Prefill document and question in one shot, then decode greedily; the document's KV is kept."""
    cache = transformers.DynamicCache(config=model.config)
    inputs = {"input_ids": torch.cat([document, question], dim=1), "past_key_values": cache}
    first_s, out = timed(lambda: forward(model, **inputs, logits_to_keep=1))
    say(f"{what}: prefill {first_s:.1f} s")
    tokens = document.shape[1]
    kv = [torch.cat([getattr(layer, part)[:, :, :tokens] for layer in cache.layers]) for part in ("keys", "values")]
    steps = greedy(model, out, lambda token: {"input_ids": token, "past_key_values": cache})
    return {"first_s": first_s, "kv": kv, **steps}


def attach(model: PreTrainedModel, prefix: kvkern.Prefix, question: Tensor) -> dict[str, Any]:
    """Read the question on an attached prefix, then decode greedily."""
    inputs = prefix.prepare(question)
    cache = inputs["past_key_values"]
    first_s, out = timed(lambda: forward(model, **inputs, logits_to_keep=1))
    return {"first_s": first_s, **greedy(model, out, lambda token: prefix.prepare(token, cache=cache))}


def greedy(model: PreTrainedModel, out: Any, inputs: Callable[[Tensor], dict[str, Any]]) -> dict[str, Any]:
    """Decode STEPS tokens; the first comes from `out`."""
    logits, new = [out.logits[0, -1]], [int(out.logits[0, -1].argmax())]
    start = time.perf_counter()
    for _ in range(STEPS - 1):
        out = forward(model, **inputs(torch.tensor([[new[-1]]])))
        logits.append(out.logits[0, -1])
        new.append(int(logits[-1].argmax()))
    return {"steps_s": time.perf_counter() - start, "new": new, "logits": logits}


def forward(model: PreTrainedModel, **inputs: Any) -> Any:
    """Run the model once."""
    with torch.inference_mode():
        return model(**inputs, use_cache=True)


def timings(run: dict[str, Any]) -> dict[str, float]:
    """Keep what goes into the JSON."""
    return {name: run[name] for name in ("first_s", "steps_s")}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two rows of logits are equal as integers."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def forget(_: Path | None = None) -> None:
    """Make the next open the first one of a process; the weights digest is measured apart."""
    shard._VERIFIED.clear()
    shard._FORMS.clear()


def drop_from_page_cache(folder: Path) -> None:
    """Have the next read come from the disk, as far as the system agrees."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def load(name: str | None, layers: int) -> PreTrainedModel:
    """Load a model, or build Qwen3-4B's true configuration with random weights: 8 GB in bf16."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, max_position_embeddings=40960,
        tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        model = transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = seeded()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1)
    model.tie_weights()
    return model.eval()


def seeded() -> torch.Generator:
    """Return the generator that weights and tokens come from."""
    return torch.Generator().manual_seed(0)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def say(text: str) -> None:
    """Report progress on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
