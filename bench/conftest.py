"""Settings of every benchmark: the environment before torch, what the JSON says of the machine, quiet progress."""

import os

# oneDNN chooses its summation order by ISA: pin the one that the contract's parity is claimed for, as the tests do.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import platform
from importlib.metadata import version

import pytest
import torch
import transformers

import kvkern
from bench.allocator import keep_freed_pages
from bench.shapes import cpu_model, last_level_cache_bytes
from kvkern.kernels import native
from kvkern.probe import stock_order

transformers.utils.logging.disable_progress_bar()
ALLOCATOR = "malloc keeps freed pages" if keep_freed_pages() else "as it is"


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    """Say what decides speed and bits, and not whose machine it is."""
    build = native.plan_build()
    packages = ("torch", "transformers", "numpy", "safetensors", "pytest-benchmark")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "onednn_max_cpu_isa": os.environ["ONEDNN_MAX_CPU_ISA"],
        "allocator": ALLOCATOR,
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": build.compiler_version,
        "compiler_flags": " ".join(build.flags),
        "stock_order": stock_order().reason,
        "versions": {
            "python": platform.python_version(),
            "kvkern": kvkern.__version__,
            **{name: version(name) for name in packages},
        },
    }


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, object]:
    """Leave the checkout out of the JSON: results are committed beside the code that they measure."""
    return {"project": "kvkern"}


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print no dot for a pass: the rotations print their own progress."""
    return ("passed", "", "") if report.passed else None
