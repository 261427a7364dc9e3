"""Predicts how long a step takes on this machine's processor, from its operations and the rates that the self-test measured.

A processor runs one operation after the other: each takes the longer of its products and its memory traffic, and the time that
the host needs for any operation. The constants were chosen with the profiles of four runs and a timed step of 8-bit AdamW, on AMD
EPYCs with AVX-512, two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.roofline import sum_over_step
from lowvram_chat.tracing.operations import Operation, Work
from lowvram_chat.tracing.rules import DeviceRules
from lowvram_chat.tracing.run import trace_run
from lowvram_chat.tracing.training_loop import MicroBatchShape

SHARE_OF_PRODUCTS, SHARE_OF_ATTENTION = 0.95, 0.75
"""Share of the measured rate of GPT-2's products that a run's products reach, and attention, FLOPs counted without the mask."""
SHARE_OF_BANDWIDTH = 0.6
"""Share of the measured bandwidth that elementwise operations and sums reach."""
OTHER_SHARES: Mapping[str, float] = {
    **dict.fromkeys(("gelu", "softmax", "tanh", "silu", "exp", "amax"), 0.25),
    "optimizer_update_8bit": 0.05,
}
"""Part of an operation's name -> its share: those that compute exponentials, or follow one that does, and 8-bit optimizers."""


@dataclass(frozen=True, kw_only=True)
class ProcessorRates:
    """What the self-test measures on a processor."""

    single_tflops: float
    """Rate of GPT-2's fp32 products."""
    gb_per_second: float
    """Bandwidth of a large elementwise operation."""
    launch_seconds: float
    """Time that the host needs for an operation."""


def seconds_of(operation: Operation, rates: ProcessorRates) -> float:
    """Return how long an operation takes."""
    share = next((share for name, share in OTHER_SHARES.items() if name in operation.name), SHARE_OF_BANDWIDTH)
    memory = operation.nbytes / (1e9 * rates.gb_per_second * share)
    reached = SHARE_OF_ATTENTION if "attention" in operation.name else SHARE_OF_PRODUCTS
    return max(operation.flops / (1e12 * rates.single_tflops * reached), memory) + rates.launch_seconds


def seconds_per_step(work: Work, rates: ProcessorRates, micro_batches: int) -> float:
    """Return how long an optimizer step of `micro_batches` takes."""
    return sum_over_step(work, micro_batches, lambda operation: seconds_of(operation, rates))


def predicted_seconds(recipe: Recipe, rates: ProcessorRates) -> float:
    """Return the predicted time of a recipe's step in fp32 with rows of the maximum length, packed rows of one document each.

    Raises:
        NotFoundError, ModelError: as `trace_run`.
    """
    shape, count = MicroBatchShape(recipe.data.max_length), recipe.train.gradient_accumulation_steps
    rows = recipe.model_copy(update={"data": recipe.data.model_copy(update={"rows": "padded"})})
    work = trace_run(rows, DeviceRules(plain_rows=True), [[shape] * min(2, count)] * 2, on_cpu=True).work
    return seconds_per_step(work, rates, count)
