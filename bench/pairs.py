"""Eight documents with a question each: the tokens that fast and stock sdpa share with stock eager; errors in ulp.

`python -m bench.pairs` reads every pair in a process of its own, in Triton's interpreter (two to four minutes each),
and writes JSON and Markdown after each; pairs that the JSON has already are not read again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A CPU has no tensor cores: the fast kernel runs in the interpreter. Stock's bits are those of the ISA named here.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from bench.pairs_report import PAGE, page
from bench.shapes import cpu_model
from bench.tables import write_page
from kvkern.model_patch.load import load_model
from kvkern.probe import stock_order
from tests.support.distances import BINS
from tests.support.interpreter import lean_interpreter
from tests.support.pairs import NUDGE_EVERY, PAIRS, STEPS, encoded, nudged, read

RESULTS = Path(__file__).parent / "results"
SEEDS = 8


def main() -> None:
    """Read all pairs, or print what came of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topic", choices=[pair.topic for pair in PAIRS], help="read this one and print JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-pairs.json")
    given = parser.parse_args()
    if given.topic:
        print(json.dumps(row(given.topic)))
        return
    results = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), "pairs": []}
    known = {found["topic"] for found in results["pairs"]}
    missing = [pair.topic for pair in PAIRS if pair.topic not in known]
    order = [pair.topic for pair in PAIRS]
    with ThreadPoolExecutor(given.jobs) as pool:
        for future in as_completed([pool.submit(in_a_process, topic) for topic in missing]):
            found = future.result()
            print(f"{found['topic']}: equal to eager's {STEPS}: {found['equal']}; {found['seconds']} s", flush=True)
            results["pairs"] = sorted([*results["pairs"], found], key=lambda one: order.index(one["topic"]))
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    if "nudged" not in results:
        results["nudged"] = {"every": NUDGE_EVERY, "equal": nudged_totals()}
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    write_page(given.out, PAGE, page)


def nudged_totals() -> list[int]:
    """Count for each seed the tokens of all pairs that eager keeps when some of attention's outputs are nudged."""
    model, tokenizer = load_model("smollm2")
    ids = [encoded(pair, lambda text: tokenizer(text).input_ids) for pair in PAIRS]
    return [sum(counts) for counts in zip(*(nudged(model, *one, seeds=SEEDS) for one in ids), strict=True)]


def in_a_process(topic: str) -> dict[str, Any]:
    """Read one pair elsewhere."""
    command = [sys.executable, "-m", "bench.pairs", "--topic", topic]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, text=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(topic: str) -> dict[str, Any]:
    """Read one pair."""
    pair = next(pair for pair in PAIRS if pair.topic == topic)
    model, tokenizer = load_model("smollm2")
    document, question = encoded(pair, lambda text: tokenizer(text).input_ids)
    start = time.perf_counter()
    with lean_interpreter():
        reading = read(model, document, question)
    return {
        "topic": topic, "question": pair.question, "document_tokens": len(document), "question_tokens": len(question),
        "steps": STEPS, **vars(reading), "seconds": round(time.perf_counter() - start),
        "answer": tokenizer.decode(reading.tokens["eager"]),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Say what decides the figures."""
    return {
        "cpu": cpu_model(), "threads": 1, "bins": BINS, "model": "SmolLM2-135M-Instruct, bf16",
        "fast": "Triton's interpreter: q, K, V and p are bf16, products of them and all sums fp32",
        "stock_order": stock_order().reason, "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
