"""The command that says what runs on this machine: env."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from typing import Annotated, Any

import typer

import kvkern
from kvkern.cli.app import ISA_VARIABLE, FormatOption, app
from kvkern.cli.view import Format, fields, flat, print_result
from kvkern.errors import KvkernError

_ModelOption = Annotated[
    str | None, typer.Option("--model", help="Say also whether this model's own eager attention is stock eager's.")
]


@app.command()
def env(model: _ModelOption = None, output: FormatOption = Format.table) -> None:
    """Show versions, the CPU, the C library, and which backend runs here; with --model, what `patch` makes of a model.

    Example: kvkern env --format json
    """
    import torch

    from kvkern.contract import CONTRACT_ID
    from kvkern.environment import cpu_isa
    from kvkern.probe import stock_order

    names = ("torch", "triton", "transformers", "safetensors")
    data = {
        "kvkern": kvkern.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "cpu_isa": cpu_isa(),
        ISA_VARIABLE: os.environ.get(ISA_VARIABLE),
        "threads": torch.get_num_threads(),
        "c_library": _c_library(),
        "contract": CONTRACT_ID,
        "plan": _plan(),
        "linear": _linear(),
        "stock": dataclasses.asdict(stock_order()),
    }
    if model is not None:
        data["model"] = _model(model)
    print_result(output, data, fields({name: "-" if value is None else value for name, value in flat(data)}))


def _model(name: str) -> dict[str, Any]:
    """Compare a model's own eager attention with stock eager's, and say what `patch` does."""
    from kvkern.cli.loading import Attention, load

    network, _ = load(name, Attention.eager)
    from kvkern.model_patch.eager_form import check_form
    from kvkern.model_patch.register import patch

    found: dict[str, Any] = {"name": name}
    try:
        found["eager"] = dataclasses.asdict(check_form(network))
        patch(network)
    except KvkernError as error:
        return {**found, "patch": f"refused: {error}"}
    return {**found, "patch": "taken: its own eager has the form of stock eager"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _c_library() -> dict[str, Any]:
    from kvkern.kernels.native import plan_build

    try:
        build = plan_build()
    except KvkernError as error:
        return {"error": str(error)}
    return {
        "compiler": f"{build.compiler} ({build.compiler_version})",
        "flags": " ".join(build.flags),
        "path": str(build.library),
        "is_compiled": build.library.exists(),
    }


def _linear() -> dict[str, str]:
    """Resolve a Linear under the contract, of one row and of many."""
    import torch

    from kvkern.operations import resolve_linear, to_k_major

    weight = to_k_major(torch.zeros(64, 64, dtype=torch.bfloat16))
    return {"one_row": resolve_linear(1, weight), "many_rows": resolve_linear(64, weight)}


def _plan() -> dict[str, str]:
    """Resolve one decode step of one reader."""
    import torch

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def counts(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    tiles, no_blocks = tensor(1, 1, 1, 64, 64), torch.zeros(1, 0, 2, dtype=torch.int64)
    kv = kvkern.KVView(tiles, no_blocks, counts(0), counts(0), tiles, tiles, counts(1), counts(1))
    plan = kvkern.resolve(tensor(1, 1, 1, 64), kv)
    return {"backend": plan.backend, "profile": plan.profile, "reason": plan.reason}
