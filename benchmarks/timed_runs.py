"""Times a training run on this machine's CPU, by stock `trl sft` or by this package, in its own process.

The first steps of each run are left out. Real tokens are those of the data, without padding.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from benchmarks import chats, processes
from benchmarks.processes import Done

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH, ROWS, WARM_UP = 256, 8, 2
"""Tokens in a row at most; conversations in a step; logged steps that are left out."""
LEARNING_RATE = "5e-5"


@dataclass(frozen=True)
class Size:
    """The cost of a model, and the number of conversations that it is trained on."""

    conversations: int
    flops_per_token: float
    """6 x (parameters of the blocks + those of the head) + 12 x layers x width x tokens in a row / 2.

    Source: "Language Models are Few-Shot Learners", appendix D, and PaLM's appendix B for the second term.
    """


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """The figures of a training run."""

    tokens_per_second: float
    """Real tokens per second after the warm-up, over all steps."""
    real_tokens: float
    rates: list[float]
    """Real tokens per second of each step after the warm-up."""
    held_out_loss: float
    """Nats per token."""
    peak_resident_mib: float


class LoggedStep(TypedDict):
    """A line of a run's log."""

    seconds: float
    real_tokens: float


def flops(layers: int, width: int, vocabulary: int, length: int = LENGTH) -> float:
    """Return the FLOPs of the matrix products per token of full fine-tuning."""
    blocks = 12 * layers * width**2
    return (
        6.0 * (blocks + vocabulary * width) + 12.0 * layers * width * length / 2
    )  # causal attention needs half of the scores


SIZES = {"tiny": Size(240, flops(4, 256, 8192)), "gpt2": Size(48, flops(12, 768, 50257))}


def prepare(folder: Path, model: str) -> None:
    """Write the model, conversations that fit in a row, and held-out ones."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.pretrained import BUILTIN_MODELS, load_tokenizer
    from lowvram_chat.quiet import quiet_libraries, quiet_transformers

    quiet_libraries()
    quiet_transformers()
    tokenizer = load_tokenizer("builtin:tiny-gpt2")
    set_template(tokenizer, "plain", "all")
    set_seed(0)
    weights: PreTrainedModel = (
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
        if model == "gpt2"
        else AutoModelForCausalLM.from_pretrained(BUILTIN_MODELS["builtin:tiny-gpt2"])
    )
    weights.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, limit in (("chitchat", SIZES[model].conversations), ("chitchat-held-out", 40)):
        fitting = [chat for chat in chats.sample(f"builtin:{split}") if _tokens(tokenizer, chat) <= LENGTH]
        chats.write(fitting, folder / split / "train.jsonl", limit)


def _tokens(tokenizer: PreTrainedTokenizerBase, chat: chats.Chat) -> int:
    """Return the number of tokens in a conversation."""
    from transformers import BatchEncoding

    encoded = tokenizer.apply_chat_template(chat["messages"], return_dict=True)
    assert isinstance(encoded, BatchEncoding)
    return len(encoded["input_ids"])


def run_trl(folder: Path, words: Sequence[str]) -> TimedRun:
    """Train with `trl sft` and return the figures of the run."""
    clock, out = folder / "clock.jsonl", folder / "out"
    clock.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # else an adapter of an earlier case would be scored
    command = [sys.executable, "-m", "benchmarks.trl_clock", str(clock), "--model_name_or_path", str(folder / "model")]
    command += ["--dataset_name", str(folder / "chitchat"), "--output_dir", str(out), "--num_train_epochs", "1"]
    command += ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none", *words]
    return _timed(_run_on_cpu(command), clock, held_out_loss(folder, out))


def run_ours(folder: Path, words: Sequence[str], rows: int, micro_batches: int = 1) -> TimedRun:
    """Train with this package and return the figures of the run; arguments as of `ours`."""
    out = folder / "run"
    command = [sys.executable, "-m", "lowvram_chat.sft", *ours(folder, out, words, rows, micro_batches)]
    done = _run_on_cpu(command, cache=folder / "cache")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    trained = out / ("adapter" if "adapter" in result else "model")
    return _timed(done, out / "metrics.jsonl", held_out_loss(folder, trained))


def ours(folder: Path, out: Path, words: Sequence[str], rows: int, micro_batches: int = 1) -> list[str]:
    """Return the arguments of `sft` for a run into `out` whose optimizer steps have `rows` rows, in `micro_batches` parts."""
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: {dropout: 0.0}\ntrain: {precision: fp32, save_steps: null}\n", encoding="utf-8")
    command = [str(recipe), "--overwrite", f"model.name={folder / 'model'}", f"output.dir={out}"]
    command += [f"data.source={folder / 'chitchat' / 'train.jsonl'}", "data.loss_on=all", f"data.max_length={LENGTH}"]
    command += [f"train.per_device_train_batch_size={rows // micro_batches}", "train.logging_steps=1"]
    command += [f"train.gradient_accumulation_steps={micro_batches}", "optimizer.name=adamw"]
    return [*command, f"train.learning_rate={LEARNING_RATE}", "train.warmup_ratio=0.06", *words]


def _run_on_cpu(command: list[str], cache: Path | None = None) -> Done:
    """Run a command on the CPU, even on a machine with a GPU."""
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "CUDA_VISIBLE_DEVICES": "-1"}
    return processes.run(command, variables | ({"LOWVRAM_CHAT_CACHE": str(cache)} if cache else {}))


def _timed(done: Done, log: Path, loss: float) -> TimedRun:
    """Return the figures of a run from its log, whose lines state the tokens and the seconds so far."""
    lines: list[LoggedStep] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "real_tokens" in line]
    first, last = logged[min(WARM_UP, len(logged) - 2)], logged[-1]
    tokens = last["real_tokens"] - first["real_tokens"]
    steps = logged[logged.index(first) :]
    rates = [
        (after["real_tokens"] - before["real_tokens"]) / (after["seconds"] - before["seconds"])
        for before, after in itertools.pairwise(steps)
    ]
    return TimedRun(
        tokens_per_second=tokens / (last["seconds"] - first["seconds"]),
        real_tokens=last["real_tokens"],
        rates=rates,
        held_out_loss=loss,
        peak_resident_mib=done.peak_resident_mib,
    )


def held_out_loss(folder: Path, trained: Path) -> float:
    """Return the loss over all tokens of the held-out conversations, computed in its own process."""
    code = "import sys; from benchmarks.timed_runs import score; print(score(sys.argv[1], sys.argv[2], sys.argv[3]))"
    words = [str(trained), str(folder / "model"), str(folder / "chitchat-held-out" / "train.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def score(trained: str, base: str, held_out: str) -> float:
    """Return the held-out loss of a model or adapter, in nats per token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowvram_chat.data.dataset import load_rows
    from lowvram_chat.data.rows import Collator
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model import scoring
    from lowvram_chat.model.loss import attach_loss
    from lowvram_chat.model.pretrained import load_tokenizer
    from lowvram_chat.recipe.schema import Data

    tokenizer = load_tokenizer(base)
    set_template(tokenizer, "plain", "all")
    is_adapter = (Path(trained) / "adapter_config.json").is_file()
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base if is_adapter else trained, dtype="float32")
    attach_loss(whole)
    model = PeftModel.from_pretrained(whole, trained) if is_adapter else whole
    rows = load_rows(Data(source=held_out, loss_on="all", max_length=LENGTH), tokenizer, 0).train
    return scoring.score(model, rows, Collator(int(tokenizer.pad_token_id)), 8).loss


def matrix_peak() -> float:
    """Return this machine's fp32 matrix-product rate, FLOP/s: the median of several products, at the best of three sizes.

    The rate changes from minute to minute with the other load of the host, so it is measured before and after every run.
    """
    import torch

    rates = []
    for size in (1024, 1536, 2048):
        left, right = torch.randn(size, size), torch.randn(size, size)
        seconds = []
        for _ in range(9):
            started = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - started)
        rates.append(2 * size**3 / statistics.median(seconds[2:]))
    return max(rates)


def packed_rows(folder: Path, conversations: int) -> int:
    """Return how many packed rows hold about as many tokens as a number of conversations do."""
    lines = (folder / "chitchat" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.pretrained import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    set_template(tokenizer, "plain", "all")
    mean = statistics.mean(_tokens(tokenizer, json.loads(line)) for line in lines)
    return max(1, round(conversations * mean / LENGTH))
