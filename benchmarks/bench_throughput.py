"""Training speed beside stock TRL, on this machine's CPU: same model, same conversations, same real tokens, one run.

    python -m benchmarks.bench_throughput --model tiny            minutes
    python -m benchmarks.bench_throughput --model gpt2 --repeat 1 GPT-2 small with random weights, a quarter of an hour
    python -m benchmarks.bench_throughput --model tiny --store    writes benchmarks/results/throughput-tiny.json

Every case is a process of its own and the cases take turns, so that a slow minute of the machine falls on all. Of each run
the first steps are left out. Real tokens are those of the data: no padding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import chats

RESULTS = Path(__file__).parent / "results"
LENGTH, ROWS, WARM_UP = 256, 8, 2
"""Tokens of a row at most; conversations of a step; logged steps that are left out."""
LEARNING_RATE = "5e-5"


@dataclass(frozen=True)
class Size:
    """A model to train, and how many conversations of it."""

    conversations: int
    flops_per_token: float
    """6 x (parameters of the blocks + those of the head) + 12 x layers x width x tokens of a row.

    Source: "Language Models are Few-Shot Learners", appendix D, and PaLM's appendix B for the second term.
    """


def _flops(layers: int, width: int, vocabulary: int) -> float:
    blocks = 12 * layers * width**2
    return 6.0 * (blocks + vocabulary * width) + 12.0 * layers * width * LENGTH / 2  # causal: half of the scores


SIZES = {"tiny": Size(240, _flops(4, 256, 8192)), "gpt2": Size(48, _flops(12, 768, 50257))}

# TRL's defaults: gradient checkpointing, bf16 autocast, dropout 0.1, GPT-2's Python GELU. Each step is logged, for the clock.
TRL_TUNED = [
    "--gradient_checkpointing", "False", "--bf16", "False", "--max_length", str(LENGTH), "--logging_steps", "1",
    "--train_sampling_strategy", "group_by_length", "--optim", "adamw_torch_fused", "--learning_rate", LEARNING_RATE,
    "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--save_strategy", "no",
    "--model_init_kwargs",
    json.dumps({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}),
]  # fmt: skip
TRL_LORA = ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "c_attn", "c_proj", "c_fc"]
TRL = {
    "trl defaults": ["--logging_steps", "1"],
    "trl tuned": TRL_TUNED,
    "trl tuned, LoRA": TRL_TUNED + TRL_LORA,
}
OURS: dict[str, list[str]] = {
    "padded": [],
    "grouped": ["data.rows=grouped"],
    "packed": ["data.rows=packed"],
    "packed, compiled": ["data.rows=packed", "train.compile=true"],
    "packed, LoRA": ["data.rows=packed", "adapter.kind=lora"],
}

LORA_SHARE = 4 / 6
"""Of the matrix products, what is left without the base's weight gradients."""

LADDER: dict[str, list[str]] = {
    "as stock": [
        "model.lean_gelu=false", "model.lean_loss=false", "data.attention_mask=true", "model.dropout=0.1",
        "train.gradient_checkpointing=true", "optimizer.name=adamw_unfused",
    ],
    "no checkpointing": ["train.gradient_checkpointing=false"],
    "dropout 0 (a change of recipe)": ["model.dropout=0.0"],
    "one-kernel GELU": ["model.lean_gelu=true"],
    "labelled positions, in tiles": ["model.lean_loss=true"],
    "no mask": ["data.attention_mask=false"],
    "fused AdamW": ["optimizer.name=adamw"],
    "packed rows": ["data.rows=packed"],
    "compiled": ["train.compile=true"],
}  # fmt: skip
"""The ablation: one substitution after the other, each on top of those before."""


def prepare(folder: Path, model: str) -> None:
    """Write the model, the conversations that fit a row, and those that are held out."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.load import BUILTIN, load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny-gpt2")
    set_template(tokenizer, "plain", "all")
    set_seed(0)
    weights: Any = (
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
        if model == "gpt2"
        else AutoModelForCausalLM.from_pretrained(BUILTIN["builtin:tiny-gpt2"])
    )
    weights.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, limit in (("chitchat", SIZES[model].conversations), ("chitchat-held-out", 40)):
        fitting = [chat for chat in chats.sample(f"builtin:{split}") if _tokens(tokenizer, chat) <= LENGTH]
        chats.write(fitting, folder / split / "train.jsonl", limit)


def _tokens(tokenizer: Any, chat: Any) -> int:
    return len(tokenizer.apply_chat_template(chat["messages"], return_dict=True)["input_ids"])


def run_trl(folder: Path, words: Sequence[str]) -> dict[str, float]:
    """Train with `trl sft`; return its figures."""
    clock, out = folder / "clock.jsonl", folder / "out"
    clock.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # an adapter of an earlier case would be scored
    command = [sys.executable, "-m", "benchmarks.trl_clock", str(clock), "--model_name_or_path", str(folder / "model")]
    command += ["--dataset_name", str(folder / "chitchat"), "--output_dir", str(out), "--num_train_epochs", "1"]
    command += ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", *words]
    figures = _process(command)
    return figures | _rate(clock) | {"held_out_loss": held_out_loss(folder, out)}


def run_ours(folder: Path, words: Sequence[str], rows: int) -> dict[str, float]:
    """Train with this package; return its figures."""
    recipe, out = folder / "recipe.yaml", folder / "run"
    recipe.write_text("model: {dropout: 0.0}\ntrain: {precision: fp32, save_steps: null}\n", encoding="utf-8")
    command = [sys.executable, "-m", "lowvram_chat.sft", str(recipe), "--overwrite", f"model.name={folder / 'model'}"]
    command += [f"data.source={folder / 'chitchat' / 'train.jsonl'}", "data.loss_on=all", f"data.max_length={LENGTH}"]
    command += [f"train.per_device_train_batch_size={rows}", "train.logging_steps=1", f"output.dir={out}"]
    command += [f"train.learning_rate={LEARNING_RATE}", "train.warmup_ratio=0.06", "optimizer.name=adamw", *words]
    figures = _process(command)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    trained = out / ("adapter" if "adapter" in result else "model")
    return figures | _rate(out / "metrics.jsonl") | {"held_out_loss": held_out_loss(folder, trained)}


def _process(command: list[str]) -> dict[str, float]:
    """Run a command to its end; return its wall time and peak resident memory.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command[:4])} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return {"wall_seconds": time.monotonic() - started, "peak_resident_mib": usage.ru_maxrss / 1024}


def _rate(lines: Path) -> dict[str, float]:
    """Return the real tokens a second after the warm-up."""
    logged = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in logged if "real_tokens" in line]
    first, last = logged[min(WARM_UP, len(logged) - 2)], logged[-1]
    tokens = last["real_tokens"] - first["real_tokens"]
    return {"tokens_per_second": tokens / (last["seconds"] - first["seconds"]), "real_tokens": last["real_tokens"]}


def held_out_loss(folder: Path, trained: Path) -> float:
    """Return the loss of all tokens of the held-out conversations, in a process of its own."""
    code = (
        "import sys; from benchmarks.bench_throughput import score; print(score(sys.argv[1], sys.argv[2], sys.argv[3]))"
    )
    words = [str(trained), str(folder / "model"), str(folder / "chitchat-held-out" / "train.jsonl")]
    said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return float(said.stdout.split()[-1])


def score(trained: str, base: str, held_out: str) -> float:
    """Return the held-out loss of a model or adapter, nats a token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowvram_chat.data.load import load_rows
    from lowvram_chat.data.rows import Collator
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model import scoring
    from lowvram_chat.model.load import load_tokenizer
    from lowvram_chat.model.loss import attach_loss
    from lowvram_chat.recipe.schema import Data

    tokenizer = load_tokenizer(base)
    set_template(tokenizer, "plain", "all")
    is_adapter = (Path(trained) / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if is_adapter else trained, dtype="float32")
    attach_loss(model)
    if is_adapter:
        model = PeftModel.from_pretrained(model, trained)
    rows = load_rows(Data(source=held_out, loss_on="all", max_length=LENGTH), tokenizer, 0).train
    return scoring.score(model, rows, Collator(int(tokenizer.pad_token_id)), 8).loss  # type: ignore[arg-type]


def matrix_peak() -> float:
    """Return this machine's fp32 matrix-product rate, FLOP/s: the best of a few sizes, after a warm-up."""
    import torch

    rates = []
    for size in (1024, 1536, 2048):
        one, other = torch.randn(size, size), torch.randn(size, size)
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            one @ other
            seconds.append(time.perf_counter() - started)
        rates.append(2 * size**3 / min(seconds))
    return max(rates)


def packed_rows(folder: Path) -> int:
    """Return the packed rows of a step that hold about as many tokens as `ROWS` conversations do."""
    lines = (folder / "chitchat" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    set_template(tokenizer, "plain", "all")
    mean = statistics.mean(_tokens(tokenizer, json.loads(line)) for line in lines)
    return max(1, round(ROWS * mean / LENGTH))


def cumulative(ladder: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return each step's words: its own on top of those of the steps before."""
    words: list[str] = []
    made = {}
    for name, own in ladder.items():
        words = words + own
        made[name] = words
    return made


def main() -> None:
    """Run the cases in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case, of which the median counts")
    parser.add_argument("--ablation", action="store_true", help="the ladder of substitutions instead of the comparison")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--store", action="store_true", help="write the figures to benchmarks/results")
    args = parser.parse_args()
    cases = {f"ours: {name}": words for name, words in OURS.items()} | {f"{name}": words for name, words in TRL.items()}
    if args.ablation:
        cases = cumulative(LADDER)
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-throughput-") as name:
        folder = Path(name)
        prepare(folder, args.model)
        few = packed_rows(folder)
        runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases if not args.only or case in args.only}
        peaks = []
        for _ in range(args.repeat):
            peaks.append(matrix_peak())
            for case in runs:
                words = cases[case]
                rows = few if "data.rows=packed" in words else ROWS
                done = run_trl(folder, words) if case.startswith("trl") else run_ours(folder, words, rows)
                runs[case].append(done)
                print(
                    f"{case}: {done['tokens_per_second']:,.0f} tokens/s, loss {done['held_out_loss']:.4f}",
                    file=sys.stderr,
                )
    report = _report(args.model, runs, peaks)
    print(json.dumps(report, indent=2))
    if args.store:
        kind = "ablation" if args.ablation else "throughput"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{kind}-{args.model}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _report(model: str, runs: dict[str, list[dict[str, float]]], peaks: list[float]) -> dict[str, Any]:
    import torch
    import transformers
    import trl

    peak = statistics.median(peaks)
    medians = {
        case: {name: round(statistics.median(run[name] for run in done), 4) for name in done[0]}
        for case, done in runs.items()
    }
    for case, figures in medians.items():
        done_share = LORA_SHARE if "LoRA" in case else 1.0
        share = figures["tokens_per_second"] * SIZES[model].flops_per_token * done_share / peak
        figures["share_of_matrix_peak"] = round(share, 3)
    return {
        "model": model,
        "repeats": len(peaks),
        "matrix_peak_gflops": round(peak / 1e9, 1),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "cases": medians,
        "all_runs_tokens_per_second": {
            case: [round(run["tokens_per_second"], 1) for run in done] for case, done in runs.items()
        },
    }


if __name__ == "__main__":
    main()
