"""What to do about a device that is full: the same optimizer step in smaller pieces, or advice."""

from __future__ import annotations

import torch

from lowvram_chat.recipe.schema import Recipe

OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "can't allocate memory",
)
"""What errors say that a full device raises beside torch.OutOfMemoryError: the driver's, cuBLAS', and a CPU's allocator."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the device is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES)
    )


def halve(recipe: Recipe) -> Recipe | None:
    """Return the recipe with half the micro-batch and twice the accumulation; None where a micro-batch is one row.

    An odd micro-batch goes down to the next divisor of the effective batch, so that the steps stay the same rows.
    """
    train = recipe.train
    batch = train.per_device_train_batch_size
    effective = train.effective_batch_size
    smaller = next((size for size in range(batch // 2, 0, -1) if effective % size == 0), None)
    if smaller is None:
        return None
    update = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": effective // smaller}
    return recipe.model_copy(update={"train": train.model_copy(update=update)})


def micro_batch_overrides(recipe: Recipe) -> str:
    """Return a recipe's micro-batch and accumulation as words for the command line."""
    train = recipe.train
    return (
        f"train.per_device_train_batch_size={train.per_device_train_batch_size} "
        f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}"
    )


def advice(recipe: Recipe, error: Exception) -> str:
    """Return what happened and what to change."""
    smaller = halve(recipe)
    changes = [] if recipe.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    changes += [] if smaller is None else [micro_batch_overrides(smaller), "memory.on_oom=halve"]
    change = f"Add {' or '.join(changes)}" if changes else "Use a smaller model, data.max_length or an adapter"
    return (
        f"{recipe.output.dir}: out of memory on the device ({str(error).splitlines()[0].rstrip('.')}). "
        f"The run folder is intact. {change}; --resume goes on from the last checkpoint."
    )
