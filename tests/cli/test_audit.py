"""`kvkern publish --producer contract` and `kvkern audit`, as a buyer types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvkern
from tests.support.models import SMALL_QWEN3


@pytest.fixture
def bought(kv, tmp_path: Path) -> tuple[Path, str]:
    """A store, and the digest of a document that was published into it under the contract."""
    text = tmp_path / "book.txt"
    text.write_text("A cache that anyone can check. " * 20)
    done = kv("publish", model_folder(tmp_path), text, "--store", tmp_path / "store", "--producer", "contract",
              "--format", "json")  # fmt: skip
    assert done.exit_code == 0, done.output
    return tmp_path / "store", json.loads(done.stdout)["digest"]


def model_folder(tmp_path: Path) -> Path:
    """The small Qwen3 with a tokenizer of one token per byte, as a directory."""
    folder = tmp_path / "model"
    if not folder.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder.mkdir()
        for file in SMALL_QWEN3.iterdir():
            if file.suffix in (".json", ".safetensors"):
                (folder / file.name).symlink_to(file)
        names = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def forged(store: Path, digest: str, model: Path) -> str:
    """The same tokens and spec, one element of KV another: published by a forger, every digest consistent."""
    from kvkern.model_patch.load import load_model

    network, _ = load_model(str(model))
    opened = kvkern.Store(store)
    with opened.open(digest, network) as prefix:
        k, v = prefix.document.kv()
        v.view(torch.int16)[2, 1, 77, 5] ^= 1
        return opened.put(prefix.spec, prefix.token_ids, k, v).digest


def test_audit_passes_an_honest_document__in_words_and_json(kv, bought, tmp_path: Path) -> None:
    store, digest = bought
    said = kv("audit", digest[:12], "--model", model_folder(tmp_path), "--store", store)
    assert said.exit_code == 0 and "the same bits" in said.stdout and "620 of 620 tokens" in said.stdout
    done = kv("audit", digest, "--all", "--model", model_folder(tmp_path), "--store", store, "--format", "json")
    data = json.loads(done.stdout)
    assert (data["ok"], data["is_verdict"], data["checked"], data["differing"]) == (True, True, 620, 0)
    assert data["digest"] == digest and data["producer"] == "contract" and data["seconds"] > 0


def test_audit_exits_2_and_names_the_place__a_forgery(kv, bought, tmp_path: Path) -> None:
    store, digest = bought
    other = forged(store, digest, model_folder(tmp_path))
    assert kv("verify", other, "--store", store).exit_code == 0, "every byte is as it was published"
    done = kv("audit", other, "--model", model_folder(tmp_path), "--store", store)
    assert done.exit_code == 2 and "DIFFERENT" in done.stdout
    assert "first at token 77, layer 2, head 1, v, 1 ulp off" in " ".join(done.stderr.split())


def test_audit_spot_check__says_what_it_can_miss(kv, bought, tmp_path: Path) -> None:
    store, digest = bought
    done = kv("audit", digest, "--tokens", 31, "--model", model_folder(tmp_path), "--store", store)
    assert done.exit_code == 0 and "a spot check" in done.stdout and "the same bits" not in done.stdout
    assert "95.0% of forgeries with one inconsistent token" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--all", "--tokens", "3"], "exclude each other"),
        (["--tokens", "9999"], "from 1 to the document's 620"),
    ],
)
def test_audit_user_errors__exit_1(kv, bought, tmp_path: Path, args: list[str], message: str) -> None:
    store, digest = bought
    done = kv("audit", digest, *args, "--model", model_folder(tmp_path), "--store", store)
    assert done.exit_code == 1 and message in " ".join(done.stderr.split())


@pytest.mark.parametrize("checked", [(), ("--tokens", 31)], ids=["all", "spot-check"])
@pytest.mark.parametrize("output", ["table", "json"])
def test_audit_of_a_stock_document__no_verdict_is_exit_code_3(
    kv, bought, tmp_path: Path, checked: tuple[object, ...], output: str
) -> None:
    """A script that asks for the exit code alone must not take a report for a proof, with differences or without."""
    store, _ = bought
    folder, text = model_folder(tmp_path), tmp_path / "book.txt"
    done = kv("publish", folder, text, "--store", store, "--format", "json")
    digest = json.loads(done.stdout)["digest"]
    found = kv("audit", digest, *checked, "--model", folder, "--store", store, "--format", output)
    assert found.exit_code == 3
    said = " ".join(found.stderr.split())
    assert "no verdict: producer 'stock' promises no bits" in said and "error:" not in said
    if output == "json":
        data = json.loads(found.stdout)
        assert data["ok"] is None and f"{data['differing']:,} of {data['elements']:,} elements differ" in said
    else:
        assert "no verdict" in found.stdout and digest in found.stdout


def test_help__names_every_exit_code(kv) -> None:
    said = " ".join(kv("--help").stdout.split())
    assert "0 fine, 1 your input, 2 damaged bytes or bits that differ, 3 no verdict" in said
