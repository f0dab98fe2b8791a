"""Documents with a question each: greedy tokens of the fast profile and stock sdpa, counted against stock eager's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton

from bench import pairs_report
from kvkern.kernels import fast
from kvkern.model_patch.load import load_model
from tests.support.distances import BINS, histogram
from tests.support.interpreter import lean_interpreter
from tests.support.models import small_qwen3
from tests.support.pairs import PAIRS, STEPS, Pair, encoded, read

RESULTS = Path(pairs_report.__file__).parent / "results"


@pytest.fixture(autouse=True)
def lean():
    if isinstance(fast.fast_kernel, triton.JITFunction):
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    with lean_interpreter():
        yield


def test_tokens_pairs__a_short_one() -> None:
    who = small_qwen3()
    found = read(who.model, who.doc(300), who.question(12), steps=6)
    assert found.tokens["fast"] == found.tokens["eager"]
    assert found.equal["fast"] == 6 >= found.equal["sdpa"]
    outputs = 4 * 8 * 128 * (12 + 5)
    assert {way: sum(counts) for way, counts in found.distances.items()} == dict.fromkeys(
        ("fast", "sdpa", "eager"), outputs
    )
    near = {way: sum(counts[:2]) for way, counts in found.distances.items()}
    assert near["fast"] > 0.95 * outputs, "fast is within one ulp of fp64 nearly everywhere"
    assert near["fast"] > near["eager"], "it rounds neither scores nor normalised weights to bf16"


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.topic)
def test_tokens_pairs__led_by_eager_fast_keeps_what_sdpa_keeps(pair: Pair) -> None:
    """About two minutes a pair. How many tokens are kept unled hangs on ties, see bench/results/PAIRS.md."""
    model, tokenizer = load_model("smollm2")
    document, question = encoded(pair, lambda text: tokenizer(text).input_ids)
    assert 300 <= len(document) <= 600
    found = read(model, document, question)
    print(f"{pair.topic}: of {STEPS} tokens, equal to eager's: {found.equal}; led by them: {found.led}")
    assert found.led["fast"] >= found.led["sdpa"]
    assert found.parted.get("fast", {}).get("margin", 0) <= pairs_report.NEAR
    assert sum(found.distances["fast"][:2]) > sum(found.distances["sdpa"][:2])


def test_record__what_the_kept_json_shows() -> None:
    """Counts are those of the tokens: led by eager's tokens fast keeps more than sdpa, left alone it keeps fewer."""
    rows = json.loads(sorted(RESULTS.glob("*-pairs.json"))[-1].read_text())["pairs"]
    for row in rows:
        for way, tokens in row["tokens"].items():
            if way != "eager":
                assert row["equal"][way] == sum(map(int.__eq__, tokens, row["tokens"]["eager"]))
        assert row["led"]["fast"] >= row["led"]["sdpa"]
        assert row["parted"].get("fast", {}).get("margin", 0) <= pairs_report.NEAR
    total = {way: sum(row["equal"][way] for row in rows) for way in ("fast", "sdpa", "sdpa-whole")}
    assert total == {"fast": 156, "sdpa": 178, "sdpa-whole": 162}, "new figures: the README and docs/ quote these"
    assert [sum(row["led"][way] for row in rows) for way in ("fast", "sdpa")] == [192, 189]


def test_histogram__counts_steps_between_neighbours() -> None:
    oracle = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 3e-5, 1.0, 1.0], dtype=torch.float64)
    step = 2.0**-7
    found = torch.tensor([1.0, 1 + step, 1 - step, -1 - 2 * step, -0.0, 2.0**-133, -3e-5, 1 + 5 * step, 2.0])
    # Below 1 steps are half as long; from one sign to the other all numbers between are counted.
    assert histogram(found.bfloat16(), oracle).tolist() == [2, 2, 2, 0, 0, 1, 0, 2]
    assert len(BINS) == 8


def test_page__says_what_the_json_holds() -> None:
    source = sorted(RESULTS.glob("*-pairs.json"))[-1]
    results = json.loads(source.read_text())
    assert [row["topic"] for row in results["pairs"]] == [pair.topic for pair in PAIRS]
    assert pairs_report.page(results, source.name) == (RESULTS / pairs_report.PAGE).read_text()
