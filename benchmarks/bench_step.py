"""How much of this machine's matrix-product rate a whole optimizer step reaches: GPT-2 small, full rows, fp32, on the CPU.

    python -m benchmarks.bench_step

The rate of products alone is taken before and after every step, since a shared machine's moves from second to second; what
counts is the median of the steps' shares. Weights are random ones of GPT-2 small's shapes, tokens are random.
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
SHARE = 0.8
"""Of the rate, at least."""
WORDS = [
    "train.precision=fp32",
    "train.gradient_accumulation_steps=1",
    f"train.per_device_train_batch_size={ROWS}",
    f"data.max_length={LENGTH}",
    "optimizer.name=adamw",
    "model.dropout=0",
    "output.sample_prompts=[]",
]


def steps() -> tuple[list[float], list[float], list[float]]:
    """Return each step's share, the rate around it (FLOP/s), and its seconds; on the CPU, on a machine with a card too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # before anything that asks for a card is imported
    quiet_libraries()
    quiet_transformers()
    import torch

    from benchmarks.step_clock import Shares
    from lowvram_chat.results import measure
    from lowvram_chat.training import run_dir

    watch = Shares(ROWS * LENGTH * flops(12, 768, 50257, LENGTH))
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-step-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = measure.training_steps_only(load_recipe(RECIPES["full_fp16"], WORDS), folder, STEPS)
        session = measure.prepare_session(recipe, torch.device("cpu"), folder, STEPS)
        session.run_steps(run_dir.create(recipe, resume=False), watch)
    kept = slice(measure.WARM_UP_STEPS, None)
    return watch.shares[kept], watch.rates[kept], watch.seconds[kept]


def share(keeper: Keeper) -> Record:
    """Measure and keep the share."""
    shares, rates, seconds = run_in_new_process(steps)
    metrics = {
        "share_of_matrix_peak": spread(shares, "1", better="higher", tolerance=0.15),
        "matrix_peak": spread([rate / 1e9 for rate in rates], "GFLOP/s"),
        "tokens_per_second": Metric(
            value=round(ROWS * LENGTH / statistics.median(seconds), 2), unit="tokens/s", kind="measured"
        ),
    }
    found = metrics["share_of_matrix_peak"].value
    problem = None if found >= SHARE else f"{found:.0%} of the matrix peak, {SHARE:.0%} wanted"
    return keeper.keep("step", "gpt2, full rows", metrics, problem=problem)


def main() -> None:
    """Measure and print."""
    record = share(Keeper.of_this_checkout(store=False))
    for name, metric in record.metrics.items():
        print(f"{name.replace('_', ' ')}: {metric.value:,.3g} {metric.unit}")


if __name__ == "__main__":
    main()
