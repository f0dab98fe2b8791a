"""Tiny random models of transformers' causal LM types, what kvkern makes of each, and the tables of docs/FAMILIES.md.

`python -m tests.support.families` writes the page anew.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "FAMILIES.md"
TESTED_WITH = "5.23.0"

# 45 families that people run, and what their tiny model has to have beside the sizes below.
NAMED: dict[str, dict[str, object]] = {
    "apertus": {}, "arcee": {}, "bert": {}, "cohere": {}, "cohere2": {},
    "deepseek_v2": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "head_dim": 16, "num_key_value_heads": 8},
    "deepseek_v3": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "head_dim": 16, "num_key_value_heads": 8},
    "diffllama": {}, "doge": {}, "ernie4_5": {}, "exaone4": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {},
    "gemma4_text": {}, "glm": {}, "glm4": {}, "glm4_moe": {},
    "glm4_moe_lite": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 32,
                      "kv_lora_rank": 32, "head_dim": 16, "num_key_value_heads": 8},
    "gpt2": {}, "gpt_bigcode": {}, "gpt_neox": {}, "gpt_oss": {}, "granite": {}, "granitemoe": {}, "helium": {},
    "hunyuan_v1_dense": {}, "llama": {}, "llama4_text": {}, "mimo_v2_flash": {}, "minimax_m2": {},
    "mistral": {"sliding_window": None}, "mixtral": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "opt": {}, "phi": {},
    "phi3": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": {}, "seed_oss": {}, "smollm3": {}, "starcoder2": {},
}  # fmt: skip

# What other types need to be built without weights.
_OTHERS: dict[str, dict[str, object]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4}, "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 8}, "dots3_note_text": {"num_key_value_heads": 8},
    "gemma3n_text": {"num_hidden_layers": 20}, "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"num_hidden_layers": 24}, "mamba2": {"num_heads": 8, "head_dim": 64, "hidden_size": 256},
    "zamba": {"num_hidden_layers": 32}, "zamba2": {"num_hidden_layers": 54}, "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "d_model": 256, "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}  # fmt: skip

_EIGHT = {"num_hidden_layers": 8}  # hybrid models attend in every fourth or eighth layer only


@dataclass(frozen=True)
class Finding:
    """What kvkern makes of a family.

    Attributes:
        form: `stock`, or what differs in its own eager attention; `-` where it has none that the interface reaches.
        verdict: `equal`, `DIFFERS`, `refused: why` or `cannot be built: why`.
    """

    form: str
    verdict: str


def model_types() -> list[str]:
    """All types of transformers' causal LMs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, device: str = "cpu", **changes: object):
    """A tiny model in bf16 under eager, with weights of a size that lets attention matter."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    own = {**NAMED.get(model_type, {}), **_OTHERS.get(model_type, {})}
    config = _config(kind.config_class or transformers.CONFIG_MAPPING[model_type], {**own, **changes})
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    if device != "meta":
        _randomise(model)
    return model


def _config(kind: type, changes: dict[str, object]):
    fields = {field.name for field in dataclasses.fields(kind)}
    given: dict[str, object] = {}
    for name, value in {**_SIZES, **changes}.items():
        own = kind.attribute_map.get(name, name)
        if own in fields:
            given[own] = value
    for name, part in kind.sub_configs.items():
        if name in fields and name not in given and dataclasses.is_dataclass(part):
            given[name] = _config(part, {})
    return kind(**given)


@torch.no_grad()
def _randomise(model) -> None:
    """Weights as large as 1 / sqrt(inputs), so that scores spread over several units."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.inference_mode()
def logits(model, length: int, steps: int = 3) -> torch.Tensor:
    """Logits of a prompt, then of single tokens on its cache, `[length + steps, vocab]`."""
    ids = torch.randint(3, 100, (1, length + steps), generator=torch.Generator().manual_seed(length))
    out = model(input_ids=ids[:, :length], use_cache=True)
    parts = [out.logits]
    for step in range(length, length + steps):
        out = model(input_ids=ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)[0]


def length_of(model_type: str) -> int:
    """A prompt length from 17 to 40 that is no multiple of 8; another for each family."""
    return [n for n in range(17, 41) if n % 8][sum(map(ord, model_type)) % 21]


def form_of(model) -> str:
    """What a model's own eager attention is."""
    from kvkern.errors import UnsupportedError
    from kvkern.model_patch.eager_form import check_form

    try:
        form = check_form(model)
    except UnsupportedError as error:
        return "-" if "has no causal attention" in str(error) else _short(str(error))
    return "stock" if form.equal else form.reason.partition(";")[0]


def verdict_of(model, model_type: str) -> str:
    """Patch a model and compare its logits with its own under eager."""
    import kvkern
    from tests.support.bits import differing

    length = length_of(model_type)
    try:
        kvkern.patch(model)
    except kvkern.UnsupportedError as error:
        return f"refused: {_short(str(error))}"
    try:
        ours = logits(model, length)
    except kvkern.UnsupportedError as error:
        return f"refused in the first forward: {_short(str(error))}"
    finally:
        kvkern.unpatch(model)
    return "equal" if differing(logits(model, length), ours) == 0 else "DIFFERS"


def _short(message: str) -> str:
    """An error without the class's name, the remedy and figures."""
    message = re.sub(r"^\w+(\.[\w.]+ \((\w+)\))?:? ", lambda m: f"{m[2]} " if m[2] else "", message)
    if found := re.match(r"its own eager attention, \S+, is not stock eager: ([^;]+)", message):
        return f"its own eager is not stock's: {found[1]}"
    return re.split(r": |; |, such as", message)[0].replace("|", "/")


def find(model_type: str) -> Finding:
    """Build a family's tiny model, check its form, and compare."""
    model = build(model_type)
    return Finding(form_of(model), verdict_of(model, model_type))


def classify(model_type: str) -> Finding:
    """Build a family's model without weights, and say what its eager function is and whether patch refuses it."""
    import kvkern
    from kvkern.model_patch.eager_form import require_form
    from kvkern.model_patch.support import require_supported

    try:
        model = build(model_type, "meta", **({} if "num_hidden_layers" in _OTHERS.get(model_type, {}) else _EIGHT))
    except Exception as error:
        return Finding("-", f"cannot be built: {type(error).__name__}, {_one_line(str(error))}")
    for module in model.modules():
        if isinstance(getattr(module, "sinks", None), torch.Tensor):
            module.sinks = torch.nn.Parameter(torch.zeros(module.sinks.shape, dtype=torch.bfloat16))
    form = form_of(model)
    try:
        require_supported(model)
        require_form(model)
    except kvkern.UnsupportedError as error:
        return Finding(form, f"refused: {_short(str(error))}")
    return Finding(form, "taken")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:90]


def rows(page: str, heading: str) -> dict[str, Finding]:
    """Read a table of the page back."""
    part = page.partition(f"## {heading}")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:3] == "| `"]
    return {name.strip("`"): Finding(form, verdict) for name, form, verdict in cells}


def _table(findings: dict[str, Finding]) -> str:
    lines = [f"| `{name}` | {finding.form} | {finding.verdict} |" for name, finding in findings.items()]
    return "\n".join(["| type | its own eager attention | patch |", "|---|---|---|", *lines])


def write_page() -> None:
    """Write docs/FAMILIES.md from what is found here."""
    named = {name: find(name) for name in sorted(NAMED)}
    every = {name: classify(name) for name in model_types()}
    equal = sum(finding.verdict == "equal" for finding in named.values())
    text = _PAGE.format(
        version=TESTED_WITH, count=len(named), equal=equal, refused=len(named) - equal, named=_table(named),
        types=len(every), using=sum(finding.form != "-" for finding in every.values()), every=_table(every),
    )  # fmt: skip
    PAGE.write_text(text)


_PAGE = """# Model families: equal, or refused and why

Stock eager is not one function: each model type of transformers brings an `eager_attention_forward` of its own. Some
round elsewhere, and some compute another function. `kvkern.patch` runs the model's own once, on rows that show each
known difference, and refuses by name what is not stock eager. `tests/model_patch/test_families.py` fails where this
page has aged; `python -m tests.support.families` writes it anew (transformers {version}, a CPU with AVX512_BF16).

A difference of rounding, such as softmax in bfloat16, can be taken: `kvkern.patch(model, allow_other_bits=True)`
computes stock eager's bits instead of the model's own, and `kvkern.resolve(...)` says so. Under profile `fast`, whose
bits are its own, such a model needs no permission. Another function (softcap, sinks) is refused always.
`kvkern env --model MODEL` says what is found for a model.

## {count} families, run

Tiny random models with the defaults of their configuration (`mistral` without its sliding window, as from version 0.2
on): a prompt of 17 to 40 tokens and three single tokens on its cache, logits compared bit for bit with the model's own
eager: {equal} equal, {refused} refused, none different.

{named}

## All types of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

{types} types; in {using} of them causal attention goes through the attention interface. Built without weights, with 8
layers. `taken`: `patch` does not refuse the defaults of the configuration. `-`: no causal attention that the interface
reaches, or no model that could be built.

{every}
"""

if __name__ == "__main__":
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    write_page()
