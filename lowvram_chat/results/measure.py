"""A recipe's real steps, measured: on full rows of made-up tokens, so that no data set is needed.

Memory and speed are two passes, each meant for a process of its own: waiting for the device at every step, which timing
needs, changes nothing of the memory, but a process that has run before does. A full device is a result, not an error.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from lowvram_chat.data.dataset import PreparedRows
from lowvram_chat.data.packing import pack_rows
from lowvram_chat.data.reader import Facts
from lowvram_chat.errors import NotFoundError
from lowvram_chat.model.configs import config_for
from lowvram_chat.model.device import check_device
from lowvram_chat.model.pretrained import load_tokenizer
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training import budget, run_dir
from lowvram_chat.training.callbacks import peak_memory
from lowvram_chat.training.oom import is_out_of_memory
from lowvram_chat.training.session import Session

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3
"""Optimizer steps that are left out: the first allocate the optimizer's states, and compile."""


class StepTimer(TrainerCallback):
    """Takes the time from one optimizer step's end to the next one's, the device waited for and the fetching of rows included;
    and the most of the device that is in use."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.device_bytes = 0
        self.ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        before, self.ended = self.ended, time.perf_counter()
        self.seconds.append(self.ended - before)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.device_bytes = max(self.device_bytes, total - free)


def measure_steps(recipe: Recipe, steps: int, of: Literal["memory", "speed"]) -> dict[str, Any]:
    """Run `steps` optimizer steps after the warm-up and return what was measured.

    Both passes give "status": "passed" or "out_of_memory". "speed": "seconds" of each step, "tokens_per_step". "memory":
    bytes at the peak ("peak_allocated_bytes", "peak_reserved_bytes", and "device_bytes" of the whole card, other
    processes' share included; "peak_resident_bytes" on a CPU). On CUDA the process is held to the recipe's budget.

    Raises:
        LowVramError: as a run with this recipe.
    """
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-measure-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = training_steps_only(recipe, folder, steps)
        device = check_device(recipe)
        budget.cap_process_memory(recipe, device)
        clock = StepTimer()
        try:
            prepare_session(recipe, device, folder, steps).run_steps(run_dir.create(recipe, resume=False), clock)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"status": "out_of_memory", "reason": str(error).splitlines()[0]}
        train = recipe.train
        rows = train.effective_batch_size
        figures: dict[str, Any] = {"status": "passed"}
        if of == "speed":
            return figures | {
                "seconds": clock.seconds[WARM_UP_STEPS:],
                "tokens_per_step": rows * recipe.data.max_length,
            }
        return figures | peak_memory() | ({"device_bytes": clock.device_bytes} if device.type == "cuda" else {})


def random_rows(recipe: Recipe, steps: int) -> PreparedRows:
    """Return full rows of random tokens, all of which carry loss: enough for the warm-up and `steps` optimizer steps."""
    import datasets

    train, length = recipe.train, recipe.data.max_length
    count = train.effective_batch_size * (steps + WARM_UP_STEPS)
    vocabulary = int(config_for(recipe.model).vocab_size)
    tokens = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, 0] = -100
    rows = datasets.Dataset.from_dict(
        {"input_ids": tokens.tolist(), "labels": labels.tolist(), "length": [length] * count}
    )
    facts = Facts(conversations=count, rows=count, tokens=count * length, loss_tokens=count * (length - 1))
    return PreparedRows(
        train=pack_rows(rows, length) if recipe.data.rows == "packed" else rows, held_out=None, facts=facts
    )


def training_steps_only(recipe: Recipe, folder: Path, steps: int) -> Recipe:
    """Return the recipe without what is not a step: evaluation, checkpoints, trackers, a schedule over an epoch, a template
    that the stand-in's tokenizer may lack."""
    nothing = {"eval_source": None, "eval_split": None, "eval_fraction": None, "chat_template": "plain"}
    data = recipe.data.model_copy(update=nothing)
    train = recipe.train.model_copy(
        update={"max_steps": steps + WARM_UP_STEPS, "save_steps": None, "eval_steps": None, "logging_steps": 10**6}
    )
    output = recipe.output.model_copy(update={"dir": str(folder / "run"), "report_to": [], "sample_prompts": []})
    return recipe.model_copy(update={"data": data, "train": train, "output": output})


def prepare_session(recipe: Recipe, device: torch.device, folder: Path, steps: int) -> Session:
    """Return the session; where the weights cannot be had, with random ones of the same shapes, which run as fast."""
    rows = random_rows(recipe, steps)
    try:
        return Session.prepare(recipe, device=device, rows=rows)
    except NotFoundError:
        from transformers import AutoModelForCausalLM

        log.info("%s is not here: measuring with random weights of its shapes", recipe.model.name)
        AutoModelForCausalLM.from_config(config_for(recipe.model)).save_pretrained(folder / "model")
        load_tokenizer("builtin:tiny-gpt2").save_pretrained(folder / "model")
        model = recipe.model.model_copy(update={"name": str(folder / "model"), "revision": None})
        return Session.prepare(recipe.model_copy(update={"model": model}), device=device, rows=rows)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
