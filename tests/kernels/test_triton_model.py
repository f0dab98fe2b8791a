"""Contract part B in Triton's interpreter: the C reference's bits, whatever the shape, the strides or the launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import kvkern
from kvkern import operations
from kvkern.kernels import activation, linear, linear_many, model_ops, native_model, norm, rotary, triton_door
from kvkern.kernels.launch_config import ModelConfig, model_config
from kvkern.tables import RopeTable, silu_table
from tests.support.bits import differing
from tests.support.interpreter import needs_interpreter

BASE = model_config("interpreter")
LONG = [pytest.mark.long, pytest.mark.slow]
NAN = float("nan")
# No bit may depend on any of these: rows, channels and k of a program, a trip that does not divide a run, the form.
CONFIGS = {
    "shipped": BASE,
    "narrow": replace(BASE, few=(1, 8, 6, 1), many=(2, 16, 2, 1), pack_pairs=4, fold_words=16, fold_runs=1,
                      norm_lanes=64, activation_lanes=128),
    "many": replace(BASE, few_rows=0, many=(8, 32, 10, 1), fold_words=64, fold_runs=2, norm_lanes=4096),
}  # fmt: skip
pytestmark = needs_interpreter
PLANTED = 2.0**20
"""Its square, 2^40, swallows everything that is added between it and its negative."""


def cancelling(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of which many cancel, and in every channel 2^40 and its negative at two places out of sixteen."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    x[:, 2::4], weight[:, 2::4] = x[:, : inputs - 2 : 4], -weight[:, : inputs - 2 : 4]
    places = torch.randperm(inputs)[:16]
    x[:, places], weight[:, places] = PLANTED, 0.0
    for channel in range(outputs):
        first, second = places[torch.randperm(len(places))[:2]]
        weight[channel, first], weight[channel, second] = PLANTED, -PLANTED
    return x.bfloat16(), weight.bfloat16()


def in_words(x: torch.Tensor) -> torch.Tensor:
    """The same rows, each beginning on a word; what a row has behind an odd end is NaN."""
    padded = torch.full((x.shape[0], x.shape[1] + x.shape[1] % 2), NAN, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded


def run_linear(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig, scratch_rows: int = 1 << 20) -> torch.Tensor:
    """Launch into a poisoned output between guards that must stay untouched, with poisoned scratch and padding."""
    rows, outputs = x.shape[0], weight.shape[0]
    k_major = in_words(weight.t())[:, :outputs].t()
    scratch = torch.full((linear.scratch_floats(min(rows, scratch_rows), weight, config),), NAN)
    guarded = torch.full((rows + 2, outputs + 3), NAN, dtype=torch.bfloat16)
    linear.launch_linear(in_words(x), k_major, guarded[1:-1, :outputs], scratch, config)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all() and guarded[:, outputs:].isnan().all()
    return guarded[1:-1, :outputs].clone()


def linear_in_c(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), NAN, dtype=torch.bfloat16)
    native_model.linear(x, weight.t().contiguous().t(), out)
    return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        pytest.param(1, 1, 17, id="M1-N1-K17"),
        pytest.param(2, 7, 35, id="M2-N7-K35"),
        pytest.param(3, 66, 70, id="M3-N66-K70"),
        pytest.param(5, 64, 64, id="M5-N64-K64"),
        pytest.param(9, 20, 48, id="M9-N20-K48"),
        pytest.param(1, 64, 513, id="M1-N64-K513", marks=LONG),
        pytest.param(2, 130, 512, id="M2-N130-K512", marks=LONG),
        pytest.param(33, 30, 66, id="M33-N30-K66", marks=LONG),
        pytest.param(3, 64, 1023, id="M3-N64-K1023", marks=LONG),
        pytest.param(3, 64, 1025, id="M3-N64-K1025", marks=LONG),
        pytest.param(2, 64, 2560, id="M2-N64-K2560", marks=LONG),
        pytest.param(2, 64, 9728, id="M2-N64-K9728", marks=LONG),
    ],
)
def test_bits_linear__shapes(config: ModelConfig, rows: int, outputs: int, inputs: int) -> None:
    x, weight = cancelling(rows, outputs, inputs)
    assert differing(run_linear(x, weight, config), linear_in_c(x, weight)) == 0


@pytest.mark.parametrize("inputs", [512, 513, 1024, 1025, 2560, 9728])
def test_bits_linear__long_sums(inputs: int) -> None:
    x, weight = cancelling(1, 64, inputs)
    assert differing(run_linear(x, weight, BASE), linear_in_c(x, weight)) == 0


def test_bits_linear__many_rows_in_slices() -> None:
    x, weight = cancelling(33, 6, 40)
    assert differing(run_linear(x, weight, BASE, scratch_rows=14), linear_in_c(x, weight)) == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_bits_linear__odd_values() -> None:
    """NaN is 0x7fc0 whatever its bits were; a sum that overflows is infinite; -0 stays -0, also behind a last k."""
    x, weight = torch.randn(6, 33).bfloat16(), torch.randn(5, 33).bfloat16()
    x[0, 3], x[1, 4], x[3] = NAN, torch.inf, 3e38
    x[2, 5] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    x[4], x[5], weight[1] = 0.0, 1e-38, -1e-38
    out = run_linear(x, weight, BASE)
    assert differing(out, linear_in_c(x, weight)) == 0 == differing(run_linear(x, weight, CONFIGS["many"]), out)
    assert set(out[0].view(torch.int16).tolist()) == {0x7FC0} == set(out[2].view(torch.int16).tolist())
    assert out[5, 1] == 0 and out[5, 1].signbit()


@triton.jit
def _even_first(x_first, first, x_second, second, total):
    return tl.fma(x_second, second, tl.fma(x_first, first, total))


def test_bits_linear__even_before_odd_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = cancelling(2, 64, 64)
    assert differing(run_linear(x, weight, BASE), linear_in_c(x, weight)) == 0
    monkeypatch.setattr(linear, "_chain", _even_first)
    assert differing(run_linear(x, weight, BASE), linear_in_c(x, weight)) > 0
    many = replace(BASE, few_rows=0)
    assert differing(run_linear(x, weight, many), linear_in_c(x, weight)) == 0
    monkeypatch.setattr(linear_many, "_chain", _even_first)
    assert differing(run_linear(x, weight, many), linear_in_c(x, weight)) > 0


@pytest.mark.parametrize(("inputs", "wrong"), [(600, 256), (600, 1024), (1100, 512)])
def test_bits_linear__other_runs_fail(monkeypatch: pytest.MonkeyPatch, inputs: int, wrong: int) -> None:
    x, weight = cancelling(1, 64, inputs)
    assert differing(run_linear(x, weight, BASE), linear_in_c(x, weight)) == 0
    monkeypatch.setattr(linear, "run_length", lambda inputs: wrong)
    assert differing(run_linear(x, weight, BASE), linear_in_c(x, weight)) > 0


def test_bits_linear__run_sums_from_right_to_left_fail() -> None:
    x, weight = cancelling(1, 64, 2200)
    runs, expected = 3, linear_in_c(x, weight)
    partial = torch.full((linear.scratch_floats(1, weight, BASE),), NAN)
    linear.launch_runs(x, weight.t().contiguous().t(), partial, BASE)
    out = torch.full_like(expected, NAN)
    linear.launch_fold(partial, out, 2200, BASE)
    assert differing(out, expected) == 0
    linear.launch_fold(partial.view(runs, -1).flip(0).contiguous(), out, 2200, BASE)
    assert differing(out, expected) > 0


@triton.jit
def _dot_kernel(x_ptr, weight_ptr, out_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(x_ptr + i * N + j), tl.load(weight_ptr + j * N + i), input_precision="ieee")
    tl.store(out_ptr + i * N + j, product)


def test_bits_linear__a_dot_product_fails() -> None:
    x, weight = cancelling(64, 64, 64)
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](x.float(), weight.float(), out, 64)
    assert differing(out.bfloat16(), linear_in_c(x, weight)) > 0


def on_edge(x: torch.Tensor) -> float:
    """An eps that all but cancels the mean of squares: what rounding did to their sum fills the output."""
    return -float((x.double() ** 2).mean()) * (1 - 2.0**-16)


def swallowing(width: int) -> torch.Tensor:
    """In every lane 2^12, then values whose squares that lane's sum swallows: until it is flushed."""
    x = torch.rand(1, width) * 0.5 + 0.5
    x[:, :32] = 4096.0
    return x.bfloat16()


def same_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, config: ModelConfig = BASE) -> int:
    """Count the outputs that differ from the C reference."""
    guarded = torch.full((x.shape[0] + 2, x.shape[1] + 1), NAN, dtype=torch.bfloat16)
    ours, theirs = guarded[1:-1, :-1], torch.full_like(x, NAN)
    norm.launch_norm(x, weight, eps, ours, config)
    native_model.rms_norm(x, weight, eps, theirs)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all() and guarded[:, -1].isnan().all()
    return differing(ours, theirs)


@pytest.mark.parametrize(
    ("name", "width"),
    [*(("shipped", width) for width in (32, 64, 96, 128, 512, 576, 2560, 8160)),
     *((name, width) for name in ("narrow", "many") for width in (96, 576, 1056))],
)  # fmt: skip
def test_bits_norm__widths(name: str, width: int) -> None:
    x, weight = torch.randn(width), torch.randn(width).bfloat16()
    shuffled = torch.stack([x[torch.randperm(width)] for _ in range(3)]).bfloat16()
    swallowed = swallowing(width)
    for rows, eps in ((shuffled, 1e-6), (shuffled, on_edge(shuffled)), (swallowed, on_edge(swallowed))):
        assert same_norm(rows, weight, eps, CONFIGS[name]) == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_bits_norm__odd_values() -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    x[0, 3], x[1, 4], x[2], x[3], weight[7] = NAN, torch.inf, 3e38, 0.0, torch.inf
    assert same_norm(x, weight) == 0


@pytest.mark.parametrize("wrong", [8, 80])
def test_bits_norm__another_flush_fails(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    x, weight = swallowing(2560), torch.ones(2560).bfloat16()
    assert same_norm(x, weight, on_edge(x)) == 0
    monkeypatch.setattr(norm, "FLUSH", tl.constexpr(wrong))
    assert same_norm(x, weight, on_edge(x)) > 0


@triton.jit
def _fused_square(total, x):
    value = norm.widen16(x)
    return tl.fma(value, value, total)


def test_bits_norm__fused_squares_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square of a bf16 is exact in fp32, so fusing shows only where squares are subnormal."""
    x, weight = (torch.randn(8, 2560) * 2.0**-71).bfloat16(), torch.ones(2560).bfloat16()
    assert same_norm(x, weight, eps=0.0) == 0
    monkeypatch.setattr(norm, "_add_square", _fused_square)
    assert same_norm(x, weight, eps=0.0) > 0


@triton.jit
def _order_kernel(x_ptr, out_ptr, WRONG: tl.constexpr):
    total = tl.load(x_ptr + tl.program_id(0) * 32 + tl.arange(0, 32))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0) if WRONG else norm._in_order(total))


def test_bits_norm__groups_in_order_then_lanes_in_order() -> None:
    x = torch.randn(200, 4, 8) * torch.exp(4 * torch.randn(200, 4, 8))
    lanes = ((x[:, 0] + x[:, 1]) + x[:, 2]) + x[:, 3]
    expected = torch.zeros(200)
    for lane in range(8):
        expected = expected + lanes[:, lane]
    ours, wrong = torch.empty(200), torch.empty(200)
    _order_kernel[(200,)](x, ours, False)
    _order_kernel[(200,)](x, wrong, True)
    assert differing(ours, expected) == 0 < differing(wrong, expected)


def rope_case(head_dim: int) -> tuple[torch.Tensor, torch.Tensor, RopeTable]:
    """Queries as transformers has them, heads and tokens transposed, and positions in no order."""
    angle = torch.arange(300)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    table = RopeTable(angle.cos().bfloat16(), angle.sin().bfloat16())
    return torch.randn(2, 5, 3, head_dim).bfloat16().transpose(1, 2), torch.randint(0, 300, (2, 5)), table


def rotate(x: torch.Tensor, positions: torch.Tensor, table: RopeTable) -> torch.Tensor:
    guarded = torch.full((4, *x.shape[1:]), NAN, dtype=torch.bfloat16)
    rotary.launch_rotary(x, positions, table.cos, table.sin, guarded[1:-1], BASE)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    return guarded[1:-1].clone()


def stock_rotary(x: torch.Tensor, positions: torch.Tensor, table: RopeTable) -> torch.Tensor:
    cos, sin = (part[positions].repeat(1, 1, 2) for part in (table.cos, table.sin))
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_bits_rotary__as_stock_has_it(head_dim: int) -> None:
    x, positions, table = rope_case(head_dim)
    expected = stock_rotary(x, positions, table)
    assert differing(rotate(x, positions, table), expected) == 0
    for path in ("triton", "torch", "auto"):
        assert differing(operations.rotary(x, positions, table, path=path), expected) == 0


def test_bits_rotary__positions_outside_the_table_are_nan() -> None:
    x, positions, table = rope_case(64)
    positions[0, 1], positions[1, 4] = 300, -1
    out, inside = rotate(x, positions, table), (positions >= 0) & (positions < 300)
    assert torch.equal(out.isnan(), ~inside[:, None, :, None].expand_as(out))


@triton.jit
def _unrounded(value):
    return value


def test_bits_rotary__fused_products_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    x, positions, table = rope_case(128)
    monkeypatch.setattr(rotary, "round16", _unrounded)
    assert differing(rotate(x, positions, table), stock_rotary(x, positions, table)) > 0


EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bits_silu__every_gate(config: ModelConfig) -> None:
    for up in (None, torch.randn(1 << 16).bfloat16(), EVERY.flip(0)):
        for count in (1 << 16, 1001):
            guarded = torch.full((count + 1,), NAN, dtype=torch.bfloat16)
            theirs = torch.empty(count, dtype=torch.bfloat16)
            some = None if up is None else up[:count]
            activation.launch_silu(EVERY[:count], some, silu_table(), guarded[:-1], config)
            native_model.silu(EVERY[:count], some, silu_table(), theirs)
            assert differing(guarded[:-1], theirs) == 0 and guarded[-1].isnan()


def test_bits_silu__stock_itself() -> None:
    gate, up = torch.randn(4000).bfloat16() * 4, torch.randn(4000).bfloat16()
    expected = torch.nn.functional.silu(gate) * up
    for path in ("triton", "c"):
        assert differing(operations.silu_times(gate, up, path=path), expected) == 0
        assert differing(operations.silu(gate, path=path), torch.nn.functional.silu(gate)) == 0


@triton.jit
def _truncated(value):
    return (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF


def test_bits_silu__truncation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = torch.randn(400).bfloat16(), torch.randn(400).bfloat16()
    monkeypatch.setattr(activation, "rounded_bits", _truncated)
    assert differing(operations.silu_times(gate, up, path="triton"), operations.silu_times(gate, up)) > 0


@pytest.mark.parametrize("outputs", [6, 7])
@pytest.mark.parametrize("inputs", [20, 21])
def test_bits_operations__any_strides(outputs: int, inputs: int) -> None:
    """Dense, k-major, sliced and odd: what a word cannot address is copied."""
    x, weight = cancelling(3, outputs, inputs)
    expected = linear_in_c(x, weight)
    wide = torch.zeros(outputs + 1, inputs + 1, dtype=torch.bfloat16)
    wide[1:, 1:] = weight
    layouts = (weight, weight.t().contiguous().t(), operations.to_k_major(weight), wide[1:, 1:],
               wide.t().contiguous().t()[1:, 1:])  # fmt: skip
    shifted = torch.zeros(3, inputs + 1, dtype=torch.bfloat16)
    shifted[:, 1:] = x
    for layout in layouts:
        for rows in (x, shifted[:, 1:], x.t().contiguous().t()):
            assert differing(operations.linear(rows[None], layout, path="triton")[0], expected) == 0
    assert operations.to_k_major(weight).stride(1) % 2 == 0


def test_bits_operations__norm_by_both_paths() -> None:
    x, weight = torch.randn(2, 3, 96).bfloat16(), torch.randn(96).bfloat16()
    by_path = [operations.rms_norm(x, weight, 1e-6, path=path) for path in ("triton", "c")]
    assert by_path[0].shape == x.shape and differing(*by_path) == 0


def test_resolve_linear__says_which_form_runs() -> None:
    weight = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert operations.resolve_linear(1, weight, path="triton") == "triton"
    assert operations.resolve_linear(1, operations.to_k_major(weight)) == "c"


def test_raises_operations__arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    table = rope_case(32)[2]
    for call in (
        lambda: operations.linear(x, x, path="cuda"),
        lambda: operations.rms_norm(x, weight, 1e-6, path="torch"),
        lambda: operations.silu(x, path="torch"),
        lambda: operations.rotary(x[None, None], torch.zeros(1, 1, dtype=torch.int64), table, path="c"),
    ):
        with pytest.raises(kvkern.LayoutError, match="path is"):
            call()
    with pytest.raises(kvkern.LayoutError, match="one shape"):
        operations.silu_times(x, weight)
    with pytest.raises(kvkern.LayoutError, match="int64"):
        operations.rotary(x[None, None], torch.zeros(1, 1, dtype=torch.int32), table)
    with pytest.raises(kvkern.LayoutError, match="one device"):
        operations.linear(x, x.to("meta"))
    monkeypatch.setattr(triton_door, "is_interpreted", lambda: False)
    for call in (lambda path: operations.linear(x, x, path=path), lambda path: operations.silu(x, path=path)):
        call("auto")
        with pytest.raises(kvkern.UnsupportedError, match="interpreter only"):
            call("triton")


def test_ops__declare_what_they_write() -> None:
    x, weight = cancelling(2, 6, 32)
    k_major, out = operations.to_k_major(weight), torch.empty(2, 6, dtype=torch.bfloat16)
    q, positions, table = rope_case(32)
    calls = (
        (model_ops.linear, (x, k_major, out, torch.zeros(linear.scratch_floats(2, weight, BASE)))),
        (model_ops.rms_norm, (x, x[0].clone(), 1e-6, torch.empty_like(x))),
        (model_ops.rotary, (q, positions, table.cos, table.sin, torch.empty_like(q))),
        (model_ops.silu, (x, None, silu_table(), torch.empty_like(x))),
        (model_ops.silu, (x, x.clone(), silu_table(), torch.empty_like(x))),
    )
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
