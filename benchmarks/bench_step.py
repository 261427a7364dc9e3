"""Measures the share of this machine's matrix-product rate that a whole optimizer step reaches.

    python -m benchmarks.bench_step

The model is GPT-2 small with random weights, in fp32 on the CPU, and its rows are full. The rate of matrix products alone is
measured before and after every step, because on a shared machine it changes from second to second. The result is the median
of the steps' shares.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.suite import RECIPES, Keeper
from benchmarks.timed_runs import flops
from lowvram_chat.quiet import quiet_libraries, quiet_transformers
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results.processes import run_in_new_process
from lowvram_chat.results.record import Metric, Record, spread

ROWS, LENGTH, STEPS = 4, 512, 5
MIN_SHARE = 0.8
"""The share of the rate that passes."""
OVERRIDES = [
    "train.precision=fp32",
    "train.gradient_accumulation_steps=1",
    f"train.per_device_train_batch_size={ROWS}",
    f"data.max_length={LENGTH}",
    "optimizer.name=adamw",
    "model.dropout=0",
    "output.sample_prompts=[]",
]


def steps() -> tuple[list[float], list[float], list[float]]:
    """Return each step's share, the rate around it in FLOP/s, and its seconds; on the CPU, even on a machine with a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before the import of anything that looks for a GPU
    quiet_libraries()
    quiet_transformers()
    import torch

    from benchmarks.step_clock import ShareClock
    from lowvram_chat.results import measure
    from lowvram_chat.training import run_dir

    clock = ShareClock(ROWS * LENGTH * flops(12, 768, 50257, LENGTH))
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-step-", ignore_cleanup_errors=True) as folder_name:
        folder = Path(folder_name)
        recipe = measure.training_steps_only(load_recipe(RECIPES["full_fp16"], OVERRIDES), folder, STEPS)
        session = measure.prepare_session(recipe, torch.device("cpu"), folder, STEPS)
        session.run_steps(run_dir.RunDir.of(recipe), clock)
    kept = slice(measure.WARM_UP_STEPS, None)
    return clock.shares[kept], clock.rates[kept], clock.seconds[kept]


def share(keeper: Keeper) -> Record:
    """Measure the share and return its record."""
    shares, rates, seconds = run_in_new_process(steps)
    metrics = {
        "share_of_matrix_peak": spread(shares, "1", better="higher", tolerance=0.15),
        "matrix_peak": spread([rate / 1e9 for rate in rates], "GFLOP/s"),
        "tokens_per_second": Metric(
            value=round(ROWS * LENGTH / statistics.median(seconds), 2), unit="tokens/s", kind="measured"
        ),
    }
    median = metrics["share_of_matrix_peak"].value
    problem = None if median >= MIN_SHARE else f"{median:.0%} of the matrix peak, at least {MIN_SHARE:.0%} expected"
    return keeper.keep("step", "gpt2, full rows", metrics, problem=problem)


def main() -> None:
    """Measure the share and print it."""
    record = share(Keeper.of_this_checkout(store=False))
    for name, metric in record.metrics.items():
        print(f"{name.replace('_', ' ')}: {metric.value:,.3g} {metric.unit}")


if __name__ == "__main__":
    main()
