"""The predicted cost of one fast decode layer on an H100, beside exact's: `python -m bench.gate.fast_model`.

Bytes, operations and programs are computed from the plan that would run (`kvkern.kernels.fast_cost`); times are a
model's, and nothing here is measured. The floor counts the suffixes too: 64 tokens a reader.
"""

from __future__ import annotations

from pathlib import Path

from bench.gate.model import GROUP, HEAD_DIM, KV_HEADS, registers_on_record
from bench.gate.model import seconds as exact_seconds
from kvkern.kernels.fast_cost import cost, seconds
from kvkern.kernels.fast_plan import FastPlan, FastShape, plan
from kvkern.kernels.launch_config import exact_config, fast_config

READERS, KEYS, SUFFIX = (1, 8, 64, 256), (3774, 32768), 64
BLOCK_TOKENS, BLOCK_TILES, SUFFIX_TILES = 256, 4, 2
PAGE = Path(__file__).parent / "FAST.md"


def plan_of(readers: int, keys: int) -> FastPlan:
    """Return the plan for readers of one prefix of a Qwen3-4B layer, one query each."""
    tiles = -(-keys // BLOCK_TOKENS) * BLOCK_TILES
    return plan(FastShape(readers, 1, KV_HEADS, GROUP, 1, HEAD_DIM, tiles, SUFFIX_TILES), fast_config("sm90"))


def predicted_us(readers: int, keys: int) -> dict[str, float]:
    """Predict the time of a layer under both profiles."""
    exact_s = exact_seconds(readers, keys + SUFFIX, exact_config("sm90"), registers_on_record())
    return {"exact": 1e6 * exact_s, "fast": 1e6 * seconds(plan_of(readers, keys), fast_config("sm90"), keys, SUFFIX)}


def recommend(readers: int, keys: int, *, stock_bits: bool) -> str:
    """Recommend a profile: `exact` for who wants the bits of stock eager, else what is predicted to be faster."""
    times = predicted_us(readers, keys)
    return "exact" if stock_bits else min(times, key=lambda name: times[name])


def page() -> str:
    """Return the Markdown page."""
    config = fast_config("sm90")
    lines = [
        "# Predictions for one fast decode layer on an H100",
        "",
        "Written by `python -m bench.gate.fast_model` from the plan that would run. No GPU has been at hand: nothing "
        "here is measured. Qwen3-4B layer, one prefix for all readers, 64 own tokens and one query each. HBM bytes are "
        "whole tiles, q, out, and states written once; states are read back from the L2 where those under way, of two "
        "KV heads, fit it, else from HBM. Both the plan and the floor (tokens, q and out, each once) include the "
        "suffixes. On sm_90 the unit of 4,096 keys is not shipped for head_dim 128: its kernel spills.",
        "",
        f"Assumed: {config.sms} SMs, {config.programs_per_sm} programs each, {config.hbm_bytes_s / 1e12} TB/s, L2 of "
        f"{config.l2_bytes / 1e6:.0f} MB at {config.l2_bytes_s / 1e12} TB/s, {config.flops_s / 1e12:.0f} TF/s, latency "
        f"{config.latency_s * 1e6:.2f} us.",
        "",
        "| keys | readers | unit | programs, idle | HBM MB | of the floor | states MB | under way, fit the L2 | GFLOP "
        "| last fold kB | us | exact us | faster |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for keys in KEYS:
        for readers in READERS:
            made, times = plan_of(readers, keys), predicted_us(readers, keys)
            spent = cost(made, config, keys, SUFFIX)
            fits = "yes" if spent.state_bytes_under_way <= config.l2_bytes else "NO"
            faster = recommend(readers, keys, stock_bits=False)
            lines.append(
                f"| {keys:,} | {readers} | {made.unit_tokens:,} | {spent.live:,}, {spent.idle:,} | "
                f"{spent.hbm_bytes / 1e6:.1f} | {spent.hbm_bytes / spent.floor_bytes:.2f} | "
                f"{spent.state_bytes / 1e6:.1f} | {spent.state_bytes_under_way / 1e6:.1f}, {fits} | "
                f"{spent.flops / 1e9:.1f} | {spent.fold_bytes / 1e3:.0f} | "
                f"{times['fast']:.1f} | {times['exact']:.1f} | {faster} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
