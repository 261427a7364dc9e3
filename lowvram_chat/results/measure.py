"""Measures the training steps of a recipe on full rows of random tokens, so that no data set is needed.

Memory and speed are two passes, each meant for its own process. Timing synchronizes with the device at every step, which
does not change the memory. What ran earlier in the same process does. An out-of-memory error is a result here.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from pathlib import Path
from typing import Literal, Required, TypedDict

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowvram_chat.data.dataset import PreparedRows
from lowvram_chat.data.facts import Facts
from lowvram_chat.data.packing import pack_rows
from lowvram_chat.errors import NotFoundError
from lowvram_chat.model.configs import config_for
from lowvram_chat.model.device import check_device
from lowvram_chat.model.out_of_memory import is_out_of_memory
from lowvram_chat.model.pretrained import load_tokenizer
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results.record import Status
from lowvram_chat.training import budget, run_dir
from lowvram_chat.training.callbacks import peak_memory
from lowvram_chat.training.session import Session

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3
"""Optimizer steps that are not measured: the first ones allocate the optimizer's states and compile the model."""
IGNORED_LABEL = -100
"""Label of a token without loss."""

Pass = Literal["memory", "speed"]
PEAK_NAMES: tuple[Literal["peak_allocated_bytes", "peak_reserved_bytes", "peak_resident_bytes"], ...] = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_resident_bytes",
)


class Measurement(TypedDict, total=False):
    """What one pass measured. `reason` is there unless `status` is "passed"; the other keys depend on the pass."""

    status: Required[Status]
    reason: str
    seconds: list[float]
    """Speed: the duration of each step."""
    tokens_per_step: int
    """Speed: tokens per optimizer step."""
    peak_allocated_bytes: int
    """Memory, on CUDA: the allocator's peak of allocated bytes."""
    peak_reserved_bytes: int
    """Memory, on CUDA: the allocator's peak of reserved bytes."""
    device_bytes: int
    """Memory, on CUDA: the most memory in use on the whole card at the end of a step, other processes included."""
    peak_resident_bytes: int
    """Memory, on a CPU: the peak resident set of the process."""


class StepTimer(TrainerCallback):
    """Times optimizer steps, and records how much of the device's memory is in use at the end of a step.

    A step lasts from the end of the previous step to its own end. It includes the loading of its rows and ends when the
    device has finished.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.device_bytes = 0
        self.ended_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        self.ended_at = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Synchronize with the device and record the step."""
        _synchronize()
        began_at, self.ended_at = self.ended_at, time.perf_counter()
        self.seconds.append(self.ended_at - began_at)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.device_bytes = max(self.device_bytes, total - free)


def measure_steps(recipe: Recipe, steps: int, of: Pass) -> Measurement:
    """Run `steps` optimizer steps after the warm-up and return what was measured.

    On CUDA, the memory of the process is capped to the recipe's budget. The status is "passed" or "out_of_memory".

    Raises:
        LowVramError: as in a run with this recipe.
    """
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-measure-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = training_steps_only(recipe, folder, steps)
        device = check_device(recipe)
        budget.cap_process_memory(recipe, device)
        timer = StepTimer()
        try:
            prepare_session(recipe, device, folder, steps).run_steps(run_dir.RunDir.of(recipe), timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"status": "out_of_memory", "reason": str(error).splitlines()[0]}
        if of == "memory":
            return _memory_measurement(timer, device)
        tokens_per_step = recipe.train.effective_batch_size * recipe.data.max_length
        return {"status": "passed", "seconds": timer.seconds[WARM_UP_STEPS:], "tokens_per_step": tokens_per_step}


def random_rows(recipe: Recipe, steps: int) -> PreparedRows:
    """Return full rows of random tokens for the warm-up and `steps` optimizer steps.

    Every token carries loss but the first of a row, which nothing predicts.
    """
    import datasets

    length = recipe.data.max_length
    count = recipe.train.effective_batch_size * (steps + WARM_UP_STEPS)
    vocabulary_size = int(config_for(recipe.model).vocab_size)
    tokens = torch.randint(vocabulary_size, (count, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, 0] = IGNORED_LABEL
    rows = datasets.Dataset.from_dict(
        {"input_ids": tokens.tolist(), "labels": labels.tolist(), "length": [length] * count}
    )
    facts = Facts(conversations=count, rows=count, tokens=count * length, loss_tokens=count * (length - 1))
    return PreparedRows(
        train=pack_rows(rows, length) if recipe.data.rows == "packed" else rows, held_out=None, facts=facts
    )


def training_steps_only(recipe: Recipe, folder: Path, steps: int) -> Recipe:
    """Return the recipe with the warm-up and `steps` optimizer steps, and nothing else.

    Evaluation, checkpoints, trackers and sample prompts are off. The chat template is the plain one, because the tokenizer
    that stands in for a missing model may lack the tokens of another.
    """
    data = recipe.data.model_copy(
        update={"eval_source": None, "eval_split": None, "eval_fraction": None, "chat_template": "plain"}
    )
    train = recipe.train.model_copy(
        update={"max_steps": steps + WARM_UP_STEPS, "save_steps": None, "eval_steps": None, "logging_steps": 10**6}
    )
    output = recipe.output.model_copy(update={"dir": str(folder / "run"), "report_to": [], "sample_prompts": []})
    return recipe.model_copy(update={"data": data, "train": train, "output": output})


def prepare_session(recipe: Recipe, device: torch.device, folder: Path, steps: int) -> Session:
    """Return a session on random rows.

    If the weights cannot be loaded, random weights of the same shapes are used, which run equally fast.
    """
    rows = random_rows(recipe, steps)
    try:
        return Session.prepare(recipe, device=device, rows=rows)
    except NotFoundError:
        log.info("%s is not available: measuring with random weights of the same shapes", recipe.model.name)
        return Session.prepare(with_random_weights(recipe, folder / "model"), device=device, rows=rows)


def with_random_weights(recipe: Recipe, folder: Path) -> Recipe:
    """Write a randomly initialised model of the recipe's architecture and return the recipe that loads it."""
    from transformers import AutoModelForCausalLM

    tokenizer, config = load_tokenizer("builtin:tiny-gpt2"), copy.copy(config_for(recipe.model))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the Trainer would warn that they differ
        setattr(config, name, getattr(tokenizer, name))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = recipe.model.model_copy(update={"name": str(folder), "revision": None})
    return recipe.model_copy(update={"model": model})


def _memory_measurement(timer: StepTimer, device: torch.device) -> Measurement:
    measurement: Measurement = {"status": "passed"}
    peaks = peak_memory()
    for name in PEAK_NAMES:
        if name in peaks:
            measurement[name] = peaks[name]
    if device.type == "cuda":
        measurement["device_bytes"] = timer.device_bytes
    return measurement


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
