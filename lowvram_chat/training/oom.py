"""Handles a device that runs out of memory: the same optimizer step in smaller micro-batches, or advice."""

from __future__ import annotations

import torch

from lowvram_chat.recipe.schema import Recipe

OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "can't allocate memory",
)
"""Parts of the messages of RuntimeErrors that the driver, cuBLAS and the CPU's allocator raise besides OutOfMemoryError."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the device ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
    )


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
    smaller = halve(recipe)
    changes = [] if recipe.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    changes += [] if smaller is None else [micro_batch_overrides(smaller), "memory.on_oom=halve"]
    change = (
        f"Add {' or '.join(changes)}" if changes else "Use a smaller model, a shorter data.max_length or an adapter"
    )
    return (
        f"{recipe.output.dir}: the device ran out of memory ({str(error).splitlines()[0].rstrip('.')}). "
        f"The run folder is intact. {change}; --resume continues from the last checkpoint."
    )
