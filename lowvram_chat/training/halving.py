"""What follows when a run's device is out of memory: the same optimizer step in smaller micro-batches, or advice."""

from __future__ import annotations

from collections.abc import Mapping

from lowvram_chat.model.out_of_memory import first_line, phase_of
from lowvram_chat.recipe.schema import Recipe

LOADING, CHECKS, EVALUATION, TRAINING, SAVING = "loading", "checks", "evaluation", "training", "saving"
"""The phases of a run in which memory can run out."""
HALVED_PHASES = (CHECKS, TRAINING)
"""Phases that a smaller micro-batch helps."""

WHERE: Mapping[str, str] = {
    LOADING: "while the model was loaded",
    CHECKS: "in the checks before the first step",
    EVALUATION: "in the evaluation",
    TRAINING: "in training",
    SAVING: "while the model was saved",
}
"""Phase -> the words of a message."""

ADVICE: Mapping[str, str] = {
    LOADING: "Use a smaller model, or an adapter with model.load_in=4bit, and close other programs that use the device",
    EVALUATION: "Set train.per_device_eval_batch_size=1, or a shorter data.max_length",
    SAVING: "Close other programs that use the machine's memory",
}
"""Phase that no smaller micro-batch helps -> what does."""


def halve(recipe: Recipe) -> Recipe | None:
    """Return the recipe with half the micro-batch and twice the accumulation; None if a micro-batch is a single row.

    An odd micro-batch goes down to the next divisor of the effective batch size, so that the steps keep their rows.
    """
    train = recipe.train
    rows = train.effective_batch_size
    sizes = range(train.per_device_train_batch_size // 2, 0, -1)
    smaller = next((size for size in sizes if rows % size == 0), None)
    if smaller is None:
        return None
    update = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": rows // smaller}
    return recipe.model_copy(update={"train": train.model_copy(update=update)})


def micro_batch_overrides(recipe: Recipe) -> str:
    """Return a recipe's micro-batch and accumulation as overrides for the command line."""
    train = recipe.train
    return (
        f"train.per_device_train_batch_size={train.per_device_train_batch_size} "
        f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}"
    )


def advice(recipe: Recipe, error: Exception) -> str:
    """Return the error message for a run that ran out of memory, with the settings to change."""
    phase = phase_of(error)
    return (
        f"{recipe.output.dir}: the device ran out of memory {WHERE[phase]} ({first_line(error)}). The run folder is intact. "
        f"{ADVICE.get(phase) or _smaller_step(recipe)}; --resume continues from the last checkpoint."
    )


def _smaller_step(recipe: Recipe) -> str:
    """Return the advice that makes a training step smaller."""
    smaller = halve(recipe)
    changes = [] if recipe.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    changes += [] if smaller is None else [micro_batch_overrides(smaller), "memory.on_oom=halve"]
    return f"Add {' or '.join(changes)}" if changes else "Use a smaller model, a shorter data.max_length or an adapter"
