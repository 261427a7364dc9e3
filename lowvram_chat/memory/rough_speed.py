"""A rough word on speed, good enough to say which of two settings is faster; no promise of seconds.

A micro-batch costs its launches, its casts and gradients at the memory's bandwidth, and its products at half the
card's rate; an optimizer step costs its states. The constants are estimates of ours, measured by
nobody: 30 ms of launches for GPT-2 small, half of the card's rate. They only rank settings.
"""

from __future__ import annotations

from lowvram_chat.recipe.gpus import GPUS
from lowvram_chat.recipe.schema import Recipe

LAUNCHES_SECONDS = 0.03
RATE = 0.5
BYTES_OF_CASTS, BYTES_OF_GRADIENTS = 6, 12
"""For each weight: read in fp32 and written in fp16; for each trained one: gradient written, read and added."""
BYTES_OF_STEP = {"adamw": 28, "adamw_unfused": 84, "adamw_8bit": 18, "paged_adamw_8bit": 18, "lion_8bit": 14}
"""Moved by an optimizer step for each trained value; 20 for the others."""
EAGER, PLAIN_GELU = 1.10, 1.05
"""What eager attention and GPT-2's own GELU add."""


def seconds_per_step(recipe: Recipe, parameters: int, trained: int) -> float:
    """Returns about how long an optimizer step takes on the recipe's card, in seconds: for comparisons only."""
    train, gpu = recipe.train, GPUS[recipe.memory.gpu]
    rate = max(gpu.fp32_tflops.values()) if train.precision == "fp32" else max(gpu.fp16_tflops.values())
    passes = (3 if recipe.adapter is None else 2) + train.gradient_checkpointing
    tokens = train.per_device_train_batch_size * recipe.data.max_length
    products = passes * 2 * parameters * tokens / (RATE * rate * 1e12)
    products *= EAGER if recipe.model.attention == "eager" else 1
    products *= PLAIN_GELU if not recipe.model.lean_gelu else 1
    moved = (BYTES_OF_CASTS * parameters + BYTES_OF_GRADIENTS * trained) / (gpu.gb_per_second * 1e9)
    step = BYTES_OF_STEP.get(recipe.optimizer.name, 20) * trained / (gpu.gb_per_second * 1e9)
    return train.gradient_accumulation_steps * (LAUNCHES_SECONDS + products + moved) + step
