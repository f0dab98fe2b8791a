"""The built wheel, outside the checkout: csrc_ref is found and compiled, a document is published and read."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, torch, kvkern
from transformers import Qwen3Config, Qwen3ForCausalLM
assert kvkern.__file__.startswith(sys.argv[1]), kvkern.__file__
torch.manual_seed(7)
config = Qwen3Config(vocab_size=64, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
store = kvkern.Store("store")
if sys.argv[2] == "publish":
    print(store.publish(model, list(range(3, 63)) * 5).digest)
else:
    kvkern.patch(model)
    with store.open(sys.argv[2], model) as prefix:
        out = model.generate(**prefix.prepare([5, 6]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert store.verify().ok and out.shape == (1, 5)
    print("read")
"""


@pytest.mark.slow
def test_wheel__publishes_and_reads_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", str(ROOT), "-w", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("kvkern-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("csrc_ref/kvkern.h", "csrc_ref/attention.c", "layout/FORMAT.md", "py.typed"):
        assert f"kvkern/{name}" in names
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", PROGRAM, str(site), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(run("publish")) == "read"
    assert list((tmp_path / "cache" / "kvkern" / "csrc").glob("*.so")), "csrc_ref was compiled from the wheel"
