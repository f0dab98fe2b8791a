"""Adapters and quantisation of a model, as fields of its spec; recognised by type, without importing peft."""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kvkern.errors import UnsupportedError
from kvkern.model_patch.forwards import is_compile_wrapper, package_of
from kvkern.spec import ABSENT, canonical_json, tagged_sha256
from kvkern.weights import cached_weights_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

# Fields of a PEFT configuration that say how tensors were made or where they came from, not what they compute.
_PROVENANCE = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    init_lora_weights init_weights layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save module_dropout peft_version revision target_modules target_parameters
    task_type
    """.split()  # noqa: SIM905 quoted one by one the names would be harder to read
)
_SIZES = ("training", "in_features", "out_features")
QUANTIZERS = frozenset(
    """
    aqlm auto_gptq auto_round autoawq awq bitsandbytes compressed_tensors eetq fbgemm_gpu gptqmodel hqq optimum quark
    spqr_quant torchao transformers vptq
    """.split()  # noqa: SIM905
)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model below a PeftModel and a `torch.compile` wrapper; a plain model is its own.

    Raises:
        UnsupportedError: the adapter puts virtual tokens in front of the prompt, so positions are not the document's.
    """
    while True:
        if is_compile_wrapper(model):
            model = model._orig_mod
        elif _is_of(model, "peft.peft_model", "PeftModel"):
            prompts = [c for c in model.peft_config.values() if getattr(c, "is_prompt_learning", False)]
            if prompts:
                raise UnsupportedError(
                    f"adapter of type {prompts[0].peft_type}: it puts virtual tokens in front of the prompt, which the "
                    "document does not hold. Take an adapter of the weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


def adapted_module(module: nn.Module) -> nn.Module:
    """Return the module below an adapter's layer; one without an adapter is its own."""
    while True:
        if _is_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            module = module.get_base_layer()
        elif _is_of(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
            module = module.original_module
        else:
            return module


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Describe the adapters that are attached to a model: what is on, active and merged, scalings, tensors' digests.

    Returns:
        A mapping of JSON scalars and mappings, in which `%` and `.` of names are written %25 and %2E; empty without
        adapters. A value that is not the same in all layers is a mapping from layer to value.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if _is_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer")
        or _is_of(module, "peft.utils.other", "AuxiliaryTrainingWrapper")
    }
    if not layers:
        return {}
    configs = getattr(model, "peft_config", {})
    names = sorted({*configs, *(name for layer in layers.values() for name in _attached(layer))})
    return {
        "is_on": _uniform({where: not layer.disable_adapters for where, layer in layers.items()}),
        "active": _uniform({where: _joined(layer.active_adapters) for where, layer in layers.items()}),
        "merged": _uniform({where: _joined(layer.merged_adapters) for where, layer in layers.items()}),
        "layers": _settings({where: _own_scalars(layer) for where, layer in layers.items()}),
        "modules": _modules_digest(layers),
        "attached": {
            escaped(name): {
                "config": _peft_config(configs.get(name)),
                "settings": _settings({where: _scalars_of(layer, name) for where, layer in layers.items()}),
                "weights": _digest(model, name, layers),
            }
            for name in names
        },
    }


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a quantised model's quantisation, names escaped as in `adapters_of`; else nothing."""
    root = base_model(model)
    config = getattr(root.config, "quantization_config", None)
    if config is None or not (getattr(root, "is_quantized", False) or getattr(root, "hf_quantizer", None) is not None):
        return {}
    settings = config if isinstance(config, dict) else config.to_dict()
    return {} if settings.get("dequantize") is True else escaped_tree(settings)


def is_quantized(module: nn.Module, kind: type[nn.Module], root: nn.Module) -> bool:
    """Tell whether a module is what a quantiser has put in the place of a module of that kind that holds weights.

    Only on a model whose spec names the quantisation; shapes are in the digest of its weights.
    """
    home = type(module).__module__
    is_quantizers = package_of(type(module)) in QUANTIZERS - {"transformers"} or home.startswith(
        "transformers.integrations."
    )
    holds_weights = issubclass(kind, (nn.Linear, nn.Embedding)) or kind.__name__.endswith(("Conv1D", "Experts"))
    return is_quantizers and holds_weights and bool(quantization_of(root))


def quantization_change(root: PreTrainedModel) -> str | None:
    """Find a quantised module that computes with other settings than the model's configuration, in words."""
    settings = quantization_of(root)
    wanted = settings.get("llm_int8_threshold")
    if not settings.get("load_in_8bit") or wanted is None:
        return None
    for name, module in root.named_modules():
        threshold = getattr(getattr(module, "state", None), "threshold", wanted)
        if threshold != wanted:
            return f"{type(root).__name__}.{name}.state.threshold is {threshold}, its configuration gives {wanted}"
    return None


def escaped(name: str) -> str:
    """Write a name as a key of a spec, so that no two names are confused: `%` as %25, `.` as %2E."""
    return name.replace("%", "%25").replace(".", "%2E") or "%"


def escaped_tree(value: Any) -> Any:
    """Keep JSON scalars and mappings of them under escaped names; lists by index, sets sorted; None is left out."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, dict):
        kept = {escaped(str(name)): escaped_tree(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in (None, {})}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return {str(i): escaped_tree(item) for i, item in enumerate(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def _is_of(thing: object, module: str, name: str) -> bool:
    """Tell whether a thing is an instance of a class of a module that may not be imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def _attached(layer: nn.Module) -> Iterable[str]:
    return layer._get_available_adapters()


def _joined(names: Iterable[str]) -> str:
    return " + ".join(map(escaped, [names] if isinstance(names, str) else names))


def _uniform(values: dict[str, Any]) -> Any:
    """One value for all layers, or a mapping from layer to value."""
    distinct = list(values.values())
    same = all(type(value) is type(distinct[0]) and value == distinct[0] for value in distinct)
    return distinct[0] if same else {escaped(where): value for where, value in values.items()}


def _settings(per_layer: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for settings in per_layer.values() for name in settings})
    return {
        escaped(name): _uniform({where: settings.get(name, ABSENT) for where, settings in per_layer.items()})
        for name in names
    }


def _own_scalars(layer: nn.Module) -> dict[str, Any]:
    scalars = {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and name not in _SIZES and type(value) in (bool, int, float, str)
    }
    return {"kind": f"{type(layer).__module__}.{type(layer).__qualname__}", **scalars}


def _modules_digest(layers: dict[str, nn.Module]) -> str:
    """Digest the classes and attributes of the modules that adapters consist of, dropout's aside."""
    found: dict[str, Any] = {}
    for where, layer in layers.items():
        for name, module in layer.named_modules():
            if name and not name.startswith(("base_layer", "original_module")):
                found[f"{where}.{name}"] = {} if isinstance(module, _DropoutNd) else _own_scalars(module)
    return tagged_sha256("kvkern-adapter-modules-v1", canonical_json(found)).hex()


def _scalars_of(layer: nn.Module, adapter: str) -> dict[str, Any]:
    """What a layer keeps for one adapter in mappings by its name, such as `scaling` and `use_dora`."""
    kept: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, dict) and adapter in value and not name.startswith("_"):
            item = value[adapter]
            kept[name] = item if type(item) in (bool, int, float, str) else type(item).__qualname__
    return kept


def _peft_config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    settings = config if isinstance(config, dict) else config.to_dict()
    return escaped_tree({name: value for name, value in settings.items() if name not in _PROVENANCE})


def _digest(model: nn.Module, adapter: str, layers: dict[str, nn.Module]) -> str:
    tensors: dict[str, Tensor] = {}
    for where, layer in layers.items():
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, name, None)
            if container is None or not hasattr(container, "keys") or adapter not in container.keys():  # noqa: SIM118
                continue
            value = container[adapter]
            if isinstance(value, Tensor):
                tensors[f"{where}.{name}"] = value
            elif isinstance(value, nn.Module):
                held = value.state_dict(keep_vars=True)
                tensors.update({f"{where}.{name}.{key}": tensor for key, tensor in held.items()})
    return cached_weights_digest(model, f"adapter {adapter}", tensors)
