"""Contract part B in C against stock torch and Hugging Face, by bits; and mutated twins of the C that must fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kvkern import operations
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels import native, native_model
from kvkern.tables import silu_table
from tests.support.bits import differing
from tests.support.stock import PROBE, needs_stock_order
from tests.support.twins import build_twin

# (out, in): SmolLM2's and Qwen3-4B's Linear (lm_heads cut), and sizes that fit nothing.
LINEAR = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 576), (4096, 2560), (1024, 2560), (2560, 4096),
          (9728, 2560), (2560, 9728), (1, 64), (7, 33), (65, 513), (130, 1025), (200, 1027)]  # fmt: skip
WIDTHS = [64, 96, 128, 192, 576, 768, 896, 1024, 1536, 2048, 2560, 4096, 5120]


def hard_linear(rows: int, out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight whose terms nearly cancel, so that every order shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * 64
    weight = torch.randn(out, inputs, generator=generator)
    half = inputs // 2
    weight[:, half : 2 * half] = -weight[:, :half] + weight[:, half : 2 * half] / 256
    x[:, half : 2 * half] = x[:, :half]
    return x.bfloat16(), weight.bfloat16()


def by_c(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The C form, its output poisoned and fenced."""
    fenced = torch.full((x.shape[0] + 2, weight.shape[0] + 3), float("nan"), dtype=torch.bfloat16)
    native_model.linear(x, operations.to_k_major(weight), fenced[1:-1, : weight.shape[0]])
    assert fenced[[0, -1]].isnan().all() and fenced[:, weight.shape[0] :].isnan().all(), "guards were written"
    return fenced[1:-1, : weight.shape[0]].contiguous()


@needs_stock_order
@pytest.mark.parametrize(("out", "inputs"), LINEAR, ids=[f"N{n}-K{k}" for n, k in LINEAR])
def test_bits_linear__c_is_stock(out: int, inputs: int) -> None:
    for rows in (1, 2, 3, 4, 5, 9, 40):
        x, weight = hard_linear(rows, out, inputs, seed=rows)
        expected = F.linear(x.repeat(2, 1), weight)[:rows]  # two rows or more: one row alone is added otherwise
        assert differing(by_c(x, weight), expected) == 0, rows


@needs_stock_order
@pytest.mark.parametrize(("out", "inputs"), [(576, 1536), (200, 1027), (96, 96)])
def test_bits_linear__one_result_for_all_paths_strides_and_threads(out: int, inputs: int) -> None:
    x, weight = hard_linear(300, out, inputs)
    expected = operations.linear(x, weight, path="torch")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 4, 5, 300):
                for path in ("c", "torch", "auto"):
                    for laid in (weight, operations.to_k_major(weight)):
                        assert differing(operations.linear(x[:rows], laid, path=path), expected[:rows]) == 0
    finally:
        torch.set_num_threads(threads)
    for rows in (2, 40, 300):
        across = x[:rows].t().contiguous().t()
        for path in ("c", "torch", "auto"):
            assert differing(operations.linear(across, weight, path=path), expected[:rows]) == 0, "x transposed"
    grown = torch.zeros(2, 3, inputs + 8, dtype=torch.bfloat16)
    grown[..., :inputs] = x[:6].view(2, 3, -1)
    assert differing(operations.linear(grown[..., :inputs], weight, path="c").view(6, -1), expected[:6]) == 0


def test_bits_linear__a_row_among_others_is_a_row_alone_however_small_the_weight() -> None:
    """Stock takes another matmul for 4,096 products or fewer."""
    x, weight = hard_linear(64, 16, 64)
    together = operations.linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 16):
        assert differing(operations.linear(x[:rows], weight), together[:rows]) == 0, rows
    assert operations.resolve_linear(4, weight) == "c"


def test_linear__no_rows_and_no_inputs() -> None:
    weight = torch.zeros(8, 64).bfloat16()
    for path in ("c", "auto"):
        assert operations.linear(torch.zeros(0, 64).bfloat16(), weight, path=path).shape == (0, 8)
        assert operations.linear(torch.zeros(2, 3, 0).bfloat16(), weight[:, :0], path=path).eq(0).all()


def test_bits_linear__odd_numbers() -> None:
    x, weight = hard_linear(5, 70, 64)
    x[0, 3], x[1, 0], x[2], weight[7, 9] = float("nan"), float("inf"), -0.0, float("-inf")
    out = by_c(x, weight)
    assert (out[0].view(torch.int16) == 0x7FC0).all(), "a NaN is the canonical one"
    assert out[1].isinf().sum() + out[1].isnan().sum() == 70
    assert by_c(x[:, :0], weight[:, :0]).eq(0).all() and by_c(x[:0], weight).shape == (0, 70)


LINEAR_TWINS = {
    "band: even row first": (
        "bands.h",
        "#define ADD_PAIR(j) ADD((j) + 1) ADD(j)",
        "#define ADD_PAIR(j) ADD(j) ADD((j) + 1)",
    ),
    "panel: even row first": (
        "chain.h",
        "int second = 1; second >= 0; second--",
        "int second = 0; second <= 1; second++",
    ),
    "runs of 256": ("contract.h", "#define LINEAR_RUN 512", "#define LINEAR_RUN 256"),
    "long runs of 512": ("contract.h", "#define LINEAR_RUN_LONG 1024", "#define LINEAR_RUN_LONG 512"),
    "long runs from 512": ("contract.h", "#define LINEAR_LONG_ABOVE 1024", "#define LINEAR_LONG_ABOVE 512"),
    "one chain over all": (
        "bands.h",
        "end = min_of(start + run_length(in), in);",
        "end = start ? start : in;",
    ),
    "last run first": (
        "linear.c",
        "item / plan.bands * run, sums + item * size",
        "item / plan.bands * run, sums + ((plan.runs - 1 - item / plan.bands) * plan.bands + item % plan.bands) * size",
    ),
    "truncated": ("arith.h", "bits += 0x7fffu + ((bits >> 16) & 1u);\n    return (uint16_t)", "return (uint16_t)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_TWINS)
def test_bits_linear__a_wrong_twin_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [hard_linear(rows, 2048, inputs) for rows in (1, 8) for inputs in (600, 3000)]
    expected = [by_c(*case) for case in cases]
    twin = build_twin(LINEAR_TWINS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(native_model, "library", lambda: twin)
    counts = [differing(by_c(*case), right) for case, right in zip(cases, expected, strict=True)]
    print(f"{name}: {counts} outputs differ")
    assert sum(counts) > 0


def stock_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    module = Qwen3RMSNorm(x.shape[-1], eps)
    module.weight.data = weight
    with torch.inference_mode():
        return module(x)


def hard_norm(width: int, rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose squares differ by many powers of two: the order of additions shows."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator) * torch.exp2(8 * torch.randn(rows, width, generator=generator))
    return x.bfloat16(), torch.randn(width, generator=generator).bfloat16()


@needs_stock_order
@pytest.mark.parametrize("width", WIDTHS)
def test_bits_rms_norm__c_is_stock(width: int) -> None:
    x, weight = hard_norm(width)
    for case in (x, x[:1], torch.randn(40, width).bfloat16(), torch.zeros(3, width).bfloat16()):
        assert differing(operations.rms_norm(case, weight, 1e-6), stock_norm(case, weight)) == 0
    heads = x[:12].view(2, 3, 2, width)
    assert differing(operations.rms_norm(heads, weight, 1e-5), stock_norm(heads, weight, 1e-5)) == 0


NORM_TWINS = {
    "flushed every 8": ("elementwise.c", "#define NORM_FLUSH 16", "#define NORM_FLUSH 8"),
    "16 lanes, 2 groups": (
        "elementwise.c",
        "#define NORM_LANES 8\n#define NORM_GROUPS 4",
        "#define NORM_LANES 16\n#define NORM_GROUPS 2",
    ),
    "lanes backwards": (
        "elementwise.c",
        "lane < NORM_LANES; lane++) sum += first[lane]",
        "lane < NORM_LANES; lane++) sum += first[NORM_LANES - 1 - lane]",
    ),
    "groups backwards": (
        "elementwise.c",
        "first[lane] += first[group * NORM_LANES + lane]",
        "first[lane] += first[(NORM_GROUPS - group) * NORM_LANES + lane]",
    ),
    "y unrounded": ("elementwise.c", "round16(round16(widen(x[i]) * inverse) *", "round16((widen(x[i]) * inverse) *"),
    "divided": ("elementwise.c", "widen(x[i]) * inverse)", "widen(x[i]) / (1.0f / inverse))"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORM_TWINS)
def test_bits_rms_norm__a_wrong_twin_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [hard_norm(width, 2000) for width in (576, 2560)]
    expected = [operations.rms_norm(x, weight, 1e-6) for x, weight in cases]
    twin = build_twin(NORM_TWINS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(native_model, "library", lambda: twin)
    assert (
        sum(differing(operations.rms_norm(*case, 1e-6), right) for case, right in zip(cases, expected, strict=True)) > 0
    )


@needs_stock_order
def test_bits_silu__the_table_is_stock_for_every_bf16() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    expected = F.silu(every)
    expected.view(torch.int16)[expected.isnan()] = 0x7FC0
    assert differing(silu_table(), expected) == 0
    assert differing(operations.silu(every.view(256, 256).t()), expected.view(256, 256).t()) == 0


def test_bits_silu__times_up() -> None:
    gate, up = torch.randn(2, 1000).bfloat16() * 8
    out = torch.full_like(gate, float("nan"))
    native_model.silu(gate, up, silu_table(), out)
    assert differing(out, operations.silu(gate) * up) == 0


def test_raises_operations__name_what_is_wrong() -> None:
    x, weight = torch.zeros(2, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    for call, message in (
        (lambda: operations.linear(x.float(), weight), "x and weight must be bfloat16"),
        (lambda: operations.linear(x, weight[:, :32]), r"\[\.\.\., in\] and \[out, in\]"),
        (lambda: operations.linear(x, weight, path="fast"), "path is 'fast'"),
        (lambda: operations.rms_norm(x, weight[0].float(), 1e-6), "x and weight must be bfloat16"),
        (lambda: operations.rms_norm(x[:, :40], weight[0, :40], 1e-6), "width is 40"),
        (lambda: operations.silu(x.float()), "must be bfloat16"),
    ):
        with pytest.raises(LayoutError, match=message):
            call()
    with pytest.raises(UnsupportedError, match="does not run on 'meta'"):
        operations.linear(x.to("meta"), weight.to("meta"))
    for call in (
        lambda: operations.linear(x.to("meta"), weight, path="c"),
        lambda: operations.rms_norm(x, weight[0].to("meta"), 1e-6),
    ):
        with pytest.raises(LayoutError, match="one device"):
            call()
    with pytest.raises(UnsupportedError, match="4096 products or fewer" if PROBE.follows else "Take path 'c'"):
        operations.linear(x, weight, path="torch")


def test_raises_operations__torch_is_refused_where_it_adds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.probe import Probe

    monkeypatch.setattr(operations, "stock_order", lambda: Probe(False, "another order"))
    x, weight = torch.zeros(9, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    assert operations.resolve_linear(9, weight) == "c"
    with pytest.raises(UnsupportedError, match="another order"):
        operations.linear(x, weight, path="torch")


def test_operations__one_place_decides() -> None:
    weight = torch.zeros(128, 64).bfloat16()
    k_major = operations.to_k_major(weight)
    assert operations.to_k_major(k_major) is k_major and operations.is_k_major(k_major)
    assert operations.resolve_linear(1, k_major) == "c"
    assert (
        operations.resolve_linear(1, weight)
        == operations.resolve_linear(5, k_major)
        == ("torch" if PROBE.follows else "c")
    )
    assert native.library().kv_abi() == native.ABI
