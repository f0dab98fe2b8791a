"""Settings that every test shares: the environment before torch, one seed, and the long runs."""

import os

# oneDNN chooses its summation order by ISA: pin the one that the contract's parity tests name.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton runs in its interpreter here; what needs its compiler runs in a process of its own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-long", action="store_true", help="run the tests marked long too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long run: pytest --run-long"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
