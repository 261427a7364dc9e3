"""How fast a recipe will run on a card, predicted from its trace: never measured, always to be called *predicted*.

    predict(recipe, plan(recipe).work, "rtx-3050-laptop-4gb", 80).tokens_per_second

What a run takes beside its optimizer steps (loading, evaluation, checkpoints, waiting for data) is left out, and every
row is taken to be of the longest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lowvram_chat.gpus import GPUS, Gpu
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing import fusion, roofline
from lowvram_chat.timing.roofline import Rates
from lowvram_chat.tracing.operations import Work


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A predicted speed."""

    gpu: str
    """A row of the card table."""
    watts: int
    """The card's power limit."""
    system: str
    """"linux" or "windows": what the host takes for a launch depends on it."""
    seconds_per_step: float
    """An optimizer step, all of its micro-batches."""
    tokens_per_step: int
    flops_per_step: int
    """Of the matrix products; those that checkpointing does twice count twice."""
    launches_per_step: int
    """Kernels."""
    physical_limit_seconds_per_step: float
    """The matrix products alone, at the card's peak rate."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the inputs, of rows that are full."""
        return self.tokens_per_step / self.seconds_per_step

    @property
    def utilisation(self) -> float:
        """Share of the card's peak rate that the matrix products reach over the whole step."""
        return self.physical_limit_seconds_per_step / self.seconds_per_step


def predict_speed(
    recipe: Recipe,
    work: Work,
    gpu: str | None = None,
    watts: int | None = None,
    *,
    compiled: bool | None = None,
    fp16_accumulation: bool | None = None,
    system: str | None = None,
) -> Speed:
    """Returns the predicted speed of a recipe whose traced operations are `work` (`Plan.work`).

    `gpu`, `compiled` (the model under `torch.compile`), `fp16_accumulation`: None for the recipe's own; `watts`: a power
    limit of the card's table, None for the highest; `system`: None for the one that asks.
    """
    compiled = bool(recipe.train.compile) if compiled is None else compiled
    fp16_accumulation = recipe.train.fp16_accumulation if fp16_accumulation is None else fp16_accumulation
    name = gpu or recipe.memory.gpu
    watts = watts or max(GPUS[name].fp16_tflops)
    system = system or ("windows" if sys.platform == "win32" else "linux")
    rates = card_rates(GPUS[name], watts, fp16_accumulation=fp16_accumulation)
    done = fusion.fuse(work) if compiled else work
    train = recipe.train
    count = train.gradient_accumulation_steps
    return Speed(
        gpu=name,
        watts=watts,
        system=system,
        seconds_per_step=roofline.seconds_per_step(done, rates, count, system),
        tokens_per_step=count * train.per_device_train_batch_size * recipe.data.max_length,
        flops_per_step=int(roofline.sum_over_step(done, count, lambda operation: operation.flops)),
        launches_per_step=int(roofline.sum_over_step(done, count, lambda operation: operation.launches)),
        physical_limit_seconds_per_step=roofline.sum_over_step(done, count, rates.seconds_at_peak),
    )


def speeds_by_power_limit(recipe: Recipe, work: Work, **asked: bool | None) -> list[Speed]:
    """Returns the predicted speed at each power limit of the recipe's card, the highest first; `asked` as of `predict_speed`."""
    limits = sorted(GPUS[recipe.memory.gpu].fp16_tflops, reverse=True)
    return [
        predict_speed(
            recipe, work, watts=watts, compiled=asked.get("compiled"), fp16_accumulation=asked.get("fp16_accumulation")
        )
        for watts in limits
    ]


def card_rates(gpu: Gpu, watts: int, *, fp16_accumulation: bool = False) -> Rates:
    """Returns what a card can do under a power limit. PyTorch leaves TF32 off unless told otherwise."""
    gain = gpu.fp16_accumulation_gain if fp16_accumulation else 1.0
    return Rates(
        half_tflops=gpu.fp16_tflops[watts] * gain,
        single_tflops=gpu.fp32_tflops[watts],
        gb_per_second=gpu.gb_per_second,
        half_on_tensor_cores=gpu.tensor_cores,
    )
