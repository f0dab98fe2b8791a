"""The Triton kernels of contract part B as torch operators, `torch.ops.kvkern.*`; they allocate nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from kvkern.kernels.activation import launch_silu
from kvkern.kernels.launch_config import ModelConfig, model_config
from kvkern.kernels.linear import launch_linear
from kvkern.kernels.norm import launch_norm
from kvkern.kernels.rotary import launch_rotary
from kvkern.kernels.triton_door import architecture

_LIBRARY = torch.library.Library("kvkern", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor(a!) out, Tensor(b!) scratch) -> ()")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()")
_LIBRARY.define("rotary(Tensor x, Tensor positions, Tensor cos, Tensor sin, Tensor(a!) out) -> ()")
_LIBRARY.define("silu(Tensor gate, Tensor? up, Tensor table, Tensor(a!) out) -> ()")


def config_for(device: torch.device) -> ModelConfig:
    """Return the launch configuration of a device."""
    return model_config(architecture(device))


def _linear(x: Tensor, weight: Tensor, out: Tensor, scratch: Tensor) -> None:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        launch_linear(x, weight, out, scratch, config_for(x.device))


def _rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    with torch.cuda.device_of(x):
        launch_norm(x, weight, eps, out, config_for(x.device))


def _rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    with torch.cuda.device_of(x):
        launch_rotary(x, positions, cos, sin, out, config_for(x.device))


def _silu(gate: Tensor, up: Tensor | None, table: Tensor, out: Tensor) -> None:
    with torch.cuda.device_of(gate):
        launch_silu(gate, up, table, out, config_for(gate.device))


for _name, _function in (("linear", _linear), ("rms_norm", _rms_norm), ("rotary", _rotary), ("silu", _silu)):
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _function, _key)
    torch.library.register_fake(f"kvkern::{_name}", lambda *_: None, lib=_LIBRARY)

linear = torch.ops.kvkern.linear
rms_norm = torch.ops.kvkern.rms_norm
rotary = torch.ops.kvkern.rotary
silu = torch.ops.kvkern.silu
