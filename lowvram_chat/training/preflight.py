"""Proves a run on its own device before its first step: what is wrong should fail now, not at hour five.

The model's weights are checked when it is loaded, its causality and the isolation of packed rows when it is built, its loss
when the trainer is built. What is left are the gradients, the saving at the end, and the memory of the longest batch.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lowvram_chat.data.rows import MODEL_INPUTS, Collator, on_device
from lowvram_chat.model.compilation import compilation_explained, is_compiled
from lowvram_chat.model.scoring import autocast, row_lengths
from lowvram_chat.training.gradient_check import check_gradients
from lowvram_chat.training.run_dir import is_main_process
from lowvram_chat.training.save_check import rehearse_saving

if TYPE_CHECKING:
    import datasets
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lowvram_chat.recipe.schema import Recipe
    from lowvram_chat.training.model_setup import BuiltModel
    from lowvram_chat.training.trainer import ChatTrainer


log = logging.getLogger(__name__)


def check_before_training(
    built: BuiltModel, tokenizer: PreTrainedTokenizerBase, trainer: ChatTrainer, run: Path, recipe: Recipe
) -> None:
    """Check gradients, saving and the longest batch, and log a line.

    Raises:
        SubstitutionError, CompilationError, ModelError, UsageError: a check failed.
        torch.OutOfMemoryError: the longest batch does not fit.
    """
    started = time.monotonic()
    check_gradients(trainer)
    if is_main_process():
        rehearse_saving(built, tokenizer, run, recipe)
    tokens = try_longest_batch(trainer)
    log.info(
        "checked: weights, loss, gradients, saving, rows of %d tokens (%.1f s)", tokens, time.monotonic() - started
    )


def try_longest_batch(trainer: ChatTrainer) -> int:
    """Run the longest batch of a trainer's rows and return its row length. A compiled model is compiled by it.

    On a CPU, which has memory to spare and takes long, it is the forward pass of the longest row, unless it compiles.

    Raises:
        CompilationError: torch.compile failed.
        torch.OutOfMemoryError: the batch does not fit.
    """
    args = trainer.args
    collate = cast("Collator", trainer.data_collator)
    model, rows = trainer.trained_model, trainer.train_dataset
    compiled = any(is_compiled(module) for module in model.modules())
    whole = compiled or args.device.type != "cpu"
    count = args.per_device_train_batch_size if whole else 1
    with compilation_explained() if compiled else contextlib.nullcontext():
        return run_longest_batch(model, rows, collate, count, trainer.precision, backward=whole)


def run_longest_batch(
    model: nn.Module,
    rows: datasets.Dataset,
    collate: Collator,
    batch_size: int,
    precision: str,
    *,
    backward: bool = True,
) -> int:
    """Run forward and backward on the batch of the longest rows, free its gradients, and return its row length.

    `backward=False` runs the forward pass alone, without keeping anything for a backward pass.

    Weights, gradients and random states are as before.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    lengths = row_lengths(rows)
    longest = sorted(range(len(rows)), key=lambda number: -lengths[number])[:batch_size]
    batch = collate([rows[number] for number in longest])
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        inputs = {name: on_device(batch[name], device) for name in MODEL_INPUTS if name in batch}
        with torch.set_grad_enabled(backward), autocast(device.type, precision):
            loss = model(**inputs)["loss"]
        if backward:
            (loss / inputs["loss_positions"].numel()).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return int(inputs["input_ids"].size(1))
