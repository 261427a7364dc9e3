"""Rehearses the end of a run before its first step: what cannot be saved, or does not fit the disk, should fail now."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from torch import nn

from lowvram_chat.errors import ModelError, UsageError
from lowvram_chat.files import delete_unfinished, discard
from lowvram_chat.model.saved_form import save_tokenizer
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.training.model_setup import BuiltModel, save_adapter_of, save_without_weights
from lowvram_chat.training.new_run import REHEARSAL
from lowvram_chat.units import format_mib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_chat.recipe.schema import Recipe

SPARE_BYTES = 64 << 20
"""Disk space for everything but weights and optimizer states."""


def rehearse_saving(built: BuiltModel, tokenizer: PreTrainedTokenizerBase, run: Path, recipe: Recipe) -> None:
    """Save the adapter, or everything of a full model but its weights, with the tokenizer, and delete it again.

    Raises:
        ModelError: something cannot be saved.
        UsageError: the folder cannot be written, or the disk has too little space for the run's files.
    """
    folder = run / REHEARSAL
    delete_unfinished(folder)  # of a run that was killed in it, and is resumed
    try:
        folder.mkdir()
        if isinstance(built.model, PeftModel):
            save_adapter_of(built, folder)
        else:
            save_without_weights(built.model, folder)
        save_tokenizer(tokenizer, folder)
    except OSError as error:
        raise UsageError(
            f"{run}: cannot be written ({error.strerror or error}). Set output.dir to a folder that can be written, or free "
            "space."
        ) from None
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{recipe.model.name}: a model trained from it could not be saved ({reason}). Correct the base's config.json and "
            "generation_config.json."
        ) from None
    finally:
        discard(folder)
    _check_space(built.model, run, recipe)


def _check_space(model: nn.Module, run: Path, recipe: Recipe) -> None:
    """Refuse a run whose checkpoints and final model need more space than the disk has free.

    Raises:
        UsageError: with the sizes.
    """
    needed, free = saved_bytes(model, recipe), shutil.disk_usage(run).free
    if needed > free:
        raise UsageError(
            f"{run}: the checkpoints and the final model need about {format_mib(needed)} MiB, and {format_mib(free)} MiB are "
            "free. Free space, lower train.save_total_limit, or set output.dir to another disk."
        )


def saved_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return about how many bytes a run has on the disk at once.

    The weights are those that are trained, in fp32. A new checkpoint is written before the oldest one is deleted.
    """
    checkpoints = recipe.train.save_total_limit + 1 if recipe.train.save_steps else 0
    return 4 * _trained(model) + checkpoints * checkpoint_bytes(model, recipe) + SPARE_BYTES


def checkpoint_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return about how many bytes a checkpoint has: the weights that are trained, in fp32, and the optimizer's states."""
    return int(_trained(model) * (4 + OPTIMIZERS[recipe.optimizer.name].state_bytes))


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
