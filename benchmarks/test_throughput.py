"""Training is faster than stock TRL on this machine's CPU; see bench_throughput."""

from __future__ import annotations

import pytest

from benchmarks import bench_throughput
from benchmarks.bench_throughput import BENCHMARKS
from benchmarks.suite import Keeper

QUICK = ("ours: packed", "trl tuned", "trl defaults")
MIN_TIMES_DEFAULTS, MIN_TIMES_TUNED = 2.5, 1.3
"""The ratios that pass: real tokens per second of packed full fine-tuning to those of TRL."""


def test_packed_rows_beat_stock_trl_at_a_loss_no_higher(keeper: Keeper, full: bool) -> None:
    cases = {name: case for name, case in BENCHMARKS["throughput"].items() if full or name in QUICK}
    records = bench_throughput.run(keeper, "throughput", "tiny", cases, 3 if full else 1)
    packed, tuned, stock = (records[name].metrics for name in QUICK)
    rates = [metrics["tokens_per_second"].value for metrics in (packed, tuned, stock)]
    losses = [metrics["held_out_loss"].value for metrics in (packed, tuned, stock)]
    problem = None
    if rates[0] < MIN_TIMES_TUNED * rates[1] or rates[0] < MIN_TIMES_DEFAULTS * rates[2]:
        problem = f"{rates[0] / rates[1]:.2f}x tuned and {rates[0] / rates[2]:.2f}x the defaults of trl sft"
        problem += f", at least {MIN_TIMES_TUNED} and {MIN_TIMES_DEFAULTS} expected"
    elif losses[0] > min(losses):
        problem = f"held-out loss {losses[0]:.4f}, stock TRL {min(losses):.4f}"
    if problem:  # the case ran but failed, and its result must say so
        keeper.keep("throughput", f"tiny: {QUICK[0]}", packed, problem=problem)
    assert problem is None


@pytest.mark.full
def test_gpt2_small_and_the_ablation(keeper: Keeper) -> None:
    bench_throughput.run(keeper, "throughput", "gpt2", BENCHMARKS["throughput"], 3)
    ladder = bench_throughput.run(keeper, "ablation", "tiny", BENCHMARKS["ablation"], 2)
    rates = {name[3:]: record.metrics["tokens_per_second"].value for name, record in ladder.items()}
    assert rates["packed rows"] > 1.5 * rates["one micro-batch"]
