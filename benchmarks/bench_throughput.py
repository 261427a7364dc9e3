"""Compares training speed with stock TRL on this machine's CPU: same model, same conversations, same real tokens.

    python -m benchmarks.bench_throughput --model tiny            minutes
    python -m benchmarks.bench_throughput --model gpt2 --repeat 1 GPT-2 small with random weights, a quarter of an hour
    python -m benchmarks.bench_throughput --ablation              one substitution after another
    python -m benchmarks.bench_throughput --store                 writes benchmarks/results/<machine>/throughput/...

Every case runs in its own process and the cases take turns, so that a slow minute of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.suite import Keeper
from benchmarks.timed_runs import (
    LEARNING_RATE,
    LENGTH,
    ROWS,
    SIZES,
    TimedRun,
    matrix_peak,
    packed_rows,
    prepare,
    run_ours,
    run_trl,
)
from lowvram_chat.quiet import quiet_libraries
from lowvram_chat.results.record import Metric, Record, spread

NOISE = 0.2
"""Relative change of a rate from run to run on a quiet shared machine: up to 0.2 was seen."""
LORA_SHARE = 4 / 6
"""Share of full fine-tuning's matrix products that LoRA computes: all but the weight gradients of the base."""


@dataclass(frozen=True)
class Case:
    """A way to train."""

    words: Sequence[str]
    """Its command-line arguments."""
    stock: bool = False
    """Whether it is run by `trl sft` instead of this package."""
    micro_batches: int = 1
    """Micro-batches of an optimizer step, in this package's runs."""

    @property
    def product_share(self) -> float:
        """Share of full fine-tuning's matrix products that it computes."""
        return LORA_SHARE if {"adapter.kind=lora", "--use_peft"} & {*self.words} else 1.0


# TRL's defaults: gradient checkpointing, bf16 autocast, dropout 0.1, GPT-2's Python GELU. The clock needs every step logged.
TRL_TUNED = [
    "--gradient_checkpointing", "False", "--bf16", "False", "--max_length", str(LENGTH), "--logging_steps", "1",
    "--train_sampling_strategy", "group_by_length", "--optim", "adamw_torch_fused", "--learning_rate", LEARNING_RATE,
    "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--save_strategy", "no",
    "--model_init_kwargs",
    json.dumps({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}),
]  # fmt: skip
TRL_LORA = [
    "--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0",
    "--lora_target_modules", "c_attn", "c_proj", "c_fc",
]  # fmt: skip

THROUGHPUT: Mapping[str, Case] = {
    "ours: padded": Case([]),
    "ours: grouped": Case(["data.rows=grouped"]),
    "ours: packed": Case(["data.rows=packed"]),
    "ours: packed, compiled": Case(["data.rows=packed", "train.compile=true"]),
    "ours: packed, LoRA": Case(["data.rows=packed", "adapter.kind=lora"]),
    "ours: packed, compiled, LoRA": Case(["data.rows=packed", "train.compile=true", "adapter.kind=lora"]),
    "trl defaults": Case(["--logging_steps", "1"], stock=True),
    "trl tuned": Case(TRL_TUNED, stock=True),
    "trl tuned, LoRA": Case([*TRL_TUNED, *TRL_LORA], stock=True),
}

FIRST_RUNG_MICRO_BATCHES = 4
"""Micro-batches of an optimizer step on the ladder's first rung; the others have one."""

LADDER: Mapping[str, Sequence[str]] = {
    "as stock, four micro-batches": [
        "model.fused_gelu=false", "model.fused_loss=false", "model.pad_vocabulary=false", "model.document_attention=false",
        "data.attention_mask=true", "model.dropout=0.1", "train.gradient_checkpointing=true", "optimizer.name=adamw_unfused",
    ],
    "one micro-batch": [],
    "no checkpointing": ["train.gradient_checkpointing=false"],
    "dropout 0 (a change of recipe)": ["model.dropout=0.0"],
    "one-kernel GELU": ["model.fused_gelu=true"],
    "labelled positions, in tiles": ["model.fused_loss=true"],
    "vocabulary padded": ["model.pad_vocabulary=true"],
    "no mask": ["data.attention_mask=false"],
    "fused AdamW": ["optimizer.name=adamw"],
    "packed rows": ["data.rows=packed"],
    "attention by document": ["model.document_attention=true"],
    "compiled": ["train.compile=true"],
    "LoRA, not compiled (a change of recipe)": ["train.compile=false", "adapter.kind=lora", "adapter.fused=false"],
    "an adapter folded in": ["adapter.fused=true"],
}  # fmt: skip
"""The ablation: one substitution after another, each on top of those before."""


def ablation() -> dict[str, Case]:
    """Return the ladder's cases, numbered so that their names sort in its order."""
    words: list[str] = []
    cases = {}
    for number, (name, added) in enumerate(LADDER.items()):
        words = [*words, *added]
        cases[f"{number:02} {name}"] = Case(words, micro_batches=1 if number else FIRST_RUNG_MICRO_BATCHES)
    return cases


BENCHMARKS = {"throughput": THROUGHPUT, "ablation": ablation()}


@dataclass(frozen=True)
class CaseRun:
    """A run of a case, and the machine's speed around it."""

    timed: TimedRun
    matrix_peak: float
    """The machine's matrix-product rate before and after the run, their mean, FLOP/s."""
    share_of_matrix_peak: float


def measure(
    model: str, cases: Mapping[str, Case], repeats: int, conversations: int = ROWS
) -> Iterator[tuple[str, list[CaseRun]]]:
    """Run the cases in turns and yield each with its runs as soon as it has all of them.

    `conversations`: how many there are in a step.
    """
    runs: dict[str, list[CaseRun]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-throughput-") as folder_name:
        folder = Path(folder_name)
        prepare(folder, model)
        packed = packed_rows(folder, conversations)
        for turn in range(repeats):
            for name, case in cases.items():
                before = matrix_peak()
                rows = packed if "data.rows=packed" in case.words else conversations
                train = run_trl if case.stock else partial(run_ours, rows=rows, micro_batches=case.micro_batches)
                timed = train(folder, case.words)
                peak = (before + matrix_peak()) / 2
                share = timed.tokens_per_second * SIZES[model].flops_per_token * case.product_share / peak
                runs[name].append(CaseRun(timed, peak, share))
                print(
                    f"{model}, {name}: {timed.tokens_per_second:,.0f} tokens/s, {share:.0%} of {peak / 1e9:.0f} GFLOP/s, "
                    f"loss {timed.held_out_loss:.4f}",
                    file=sys.stderr,
                )
                if turn == repeats - 1:
                    yield name, runs[name]


def metrics(runs: Sequence[CaseRun]) -> dict[str, Metric]:
    """Return a case's runs as metrics: medians over the runs, percentiles over all steps."""
    timed = [run.timed for run in runs]
    steps = spread([rate for run in timed for rate in run.rates], "tokens/s")
    speed = _median([run.tokens_per_second for run in timed], "tokens/s", "higher", NOISE)
    return {
        "tokens_per_second": speed.model_copy(update={"p20": steps.p20, "p80": steps.p80}),
        "held_out_loss": _median([run.held_out_loss for run in timed], "nats", "lower", 0.005),
        "peak_resident": _median([run.peak_resident_mib for run in timed], "MiB", "lower", 0.1),
        "share_of_matrix_peak": _median([run.share_of_matrix_peak for run in runs], "1"),
        "matrix_peak": _median([run.matrix_peak / 1e9 for run in runs], "GFLOP/s"),
        "real_tokens": _median([run.real_tokens for run in timed], "tokens"),
    }


def _median(
    values: Sequence[float], unit: str, better: Literal["lower", "higher", "same"] = "same", tolerance: float = 0.0
) -> Metric:
    value = round(float(statistics.median(values)), 4)
    return Metric(value=value, unit=unit, kind="measured", samples=len(values), better=better, tolerance=tolerance)


def run(keeper: Keeper, benchmark: str, model: str, cases: Mapping[str, Case], repeats: int) -> dict[str, Record]:
    """Measure the cases, keep each result, and return the record of each case."""
    return {
        case: keeper.keep(benchmark, f"{model}: {case}", metrics(runs)) for case, runs in measure(model, cases, repeats)
    }


def main() -> None:
    """Run the cases in turns and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case; the median counts")
    parser.add_argument(
        "--ablation", action="store_true", help="run the ladder of substitutions instead of the comparison"
    )
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--store", action="store_true", help="write the results to benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    benchmark = "ablation" if args.ablation else "throughput"
    cases = {name: case for name, case in BENCHMARKS[benchmark].items() if not args.only or name in args.only}
    run(Keeper.of_this_checkout(store=args.store), benchmark, args.model, cases, args.repeat)


if __name__ == "__main__":
    main()
