"""Training speed beside stock TRL, on this machine's CPU: same model, same conversations, same real tokens, one run.

    python -m benchmarks.bench_throughput --model tiny            minutes
    python -m benchmarks.bench_throughput --model gpt2 --repeat 1 GPT-2 small with random weights, a quarter of an hour
    python -m benchmarks.bench_throughput --ablation              one substitution after the other
    python -m benchmarks.bench_throughput --store                 writes benchmarks/results/<machine>/throughput/...

Every case is a process of its own and the cases take turns, so that a slow minute of the machine falls on all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.suite import Keeper
from benchmarks.timed_runs import (
    LEARNING_RATE,
    LENGTH,
    ROWS,
    SIZES,
    matrix_peak,
    packed_rows,
    prepare,
    run_ours,
    run_trl,
)
from lowvram_chat.quiet import quiet_libraries
from lowvram_chat.results.record import Metric, Record, spread

NOISE = 0.2
"""Relative change of a rate from one run to the next on a quiet shared machine: up to 0.2 was seen."""
LORA_SHARE = 4 / 6
"""Of the matrix products, what is left without the base's weight gradients."""


@dataclass(frozen=True)
class Case:
    """A way to train: the words of its command line."""

    words: Sequence[str]
    stock: bool = False
    """Run by `trl sft`, not by this package."""
    micro_batches: int = 1
    """Into which this package cuts an optimizer step."""

    @property
    def share(self) -> float:
        """What is done of full fine-tuning's matrix products."""
        return LORA_SHARE if {"adapter.kind=lora", "--use_peft"} & {*self.words} else 1.0


# TRL's defaults: gradient checkpointing, bf16 autocast, dropout 0.1, GPT-2's Python GELU. Each step is logged, for the clock.
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

ACCUMULATED = 4
"""Micro-batches of an optimizer step where the ladder begins; above its first rung there is one."""

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
"""The ablation: one substitution after the other, each on top of those before."""


def ablation() -> dict[str, Case]:
    """Return the ladder's cases, numbered so that they sort as they stand."""
    words: list[str] = []
    cases = {}
    for number, (name, own) in enumerate(LADDER.items()):
        words = [*words, *own]
        cases[f"{number:02} {name}"] = Case(words, micro_batches=1 if number else ACCUMULATED)
    return cases


BENCHMARKS = {"throughput": THROUGHPUT, "ablation": ablation()}


def measure(
    model: str, cases: Mapping[str, Case], repeats: int, conversations: int = ROWS
) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Run the cases in turns, with so many conversations a step; yield each with its runs as soon as it has all of them."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-throughput-") as name:
        folder = Path(name)
        prepare(folder, model)
        few = packed_rows(folder, conversations)
        for turn in range(repeats):
            for case, how in cases.items():
                before = matrix_peak()
                rows = few if "data.rows=packed" in how.words else conversations
                train = run_trl if how.stock else partial(run_ours, rows=rows, micro_batches=how.micro_batches)
                done = train(folder, how.words)
                peak = (before + matrix_peak()) / 2
                share = done["tokens_per_second"] * SIZES[model].flops_per_token * how.share / peak
                runs[case].append(done | {"matrix_peak_gflops": peak / 1e9, "share_of_matrix_peak": share})
                print(
                    f"{model}, {case}: {done['tokens_per_second']:,.0f} tokens/s, {share:.0%} of {peak / 1e9:.0f} GFLOP/s, "
                    f"loss {done['held_out_loss']:.4f}",
                    file=sys.stderr,
                )
                if turn == repeats - 1:
                    yield case, runs[case]


def metrics(runs: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Return a case's runs as metrics: medians over the runs, percentiles over all steps."""
    steps = spread([rate for run in runs for rate in run["rates"]], "tokens/s")

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    def measured(name: str, unit: str, **more: Any) -> Metric:
        return Metric(value=round(median(name), 4), unit=unit, kind="measured", samples=len(runs), **more)

    return {
        "tokens_per_second": measured("tokens_per_second", "tokens/s", better="higher", tolerance=NOISE).model_copy(
            update={"p20": steps.p20, "p80": steps.p80}
        ),
        "held_out_loss": measured("held_out_loss", "nats", better="lower", tolerance=0.005),
        "peak_resident": measured("peak_resident_mib", "MiB", better="lower", tolerance=0.1),
        "share_of_matrix_peak": measured("share_of_matrix_peak", "1"),
        "matrix_peak": measured("matrix_peak_gflops", "GFLOP/s"),
        "real_tokens": measured("real_tokens", "tokens"),
    }


def run(keeper: Keeper, benchmark: str, model: str, cases: Mapping[str, Case], repeats: int) -> dict[str, Record]:
    """Measure cases and keep each result; returns case -> record."""
    return {
        case: keeper.keep(benchmark, f"{model}: {case}", metrics(runs)) for case, runs in measure(model, cases, repeats)
    }


def main() -> None:
    """Run the cases in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case, of which the median counts")
    parser.add_argument("--ablation", action="store_true", help="the ladder of substitutions instead of the comparison")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--store", action="store_true", help="write the results to benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    benchmark = "ablation" if args.ablation else "throughput"
    cases = {name: case for name, case in BENCHMARKS[benchmark].items() if not args.only or name in args.only}
    run(Keeper.of_this_checkout(store=args.store), benchmark, args.model, cases, args.repeat)


if __name__ == "__main__":
    main()
