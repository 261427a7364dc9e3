"""Predicts the speed of a recipe on a card from its trace. A predicted speed must always be called *predicted*.

    predict_speed(recipe, make_plan(recipe).work, "rtx-3050-laptop-4gb", 80).tokens_per_second

Only optimizer steps count: loading, evaluations, checkpoints and waiting for data are left out. All rows are taken to have
the maximum length.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_chat.gpus import GPUS, Gpu, this_system
from lowvram_chat.recipe.card import card_of, name_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing import roofline
from lowvram_chat.timing.fusion import fuse
from lowvram_chat.timing.roofline import Rates
from lowvram_chat.tracing.operations import Work


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A predicted speed."""

    gpu: str
    """Name of the card: its row in the GPU table, or what a described card is called."""
    watts: int
    """Power limit of the card."""
    system: str
    """"linux" or "windows", which differ in the time that the host needs for a kernel launch."""
    seconds_per_step: float
    """Time of an optimizer step with all of its micro-batches."""
    tokens_per_step: int
    flops_per_step: int
    """FLOPs of the matrix products; products that checkpointing computes twice count twice."""
    launches_per_step: int
    """Kernel launches."""
    physical_limit_seconds_per_step: float
    """Time of the matrix products alone at the card's peak rate."""

    @property
    def tokens_per_second(self) -> float:
        """Input tokens per second, for rows of the maximum length."""
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
    """Return the predicted speed of a recipe whose traced operations are `work` (`Plan.work`).

    `gpu`, `compiled` (the model under `torch.compile`) and `fp16_accumulation` default to the recipe's own. `watts` is a
    power limit from the card's table (default: the highest), and `system` defaults to this machine's.
    """
    compiled = bool(recipe.train.compile) if compiled is None else compiled
    fp16_accumulation = recipe.train.fp16_accumulation if fp16_accumulation is None else fp16_accumulation
    card = card_of(recipe.memory) if gpu is None else GPUS[gpu]
    watts = card.nearest_limit(watts)
    system = system or this_system()
    rates = card_rates(card, watts, fp16_accumulation=fp16_accumulation)
    operations = fuse(work) if compiled else work
    train = recipe.train
    count = train.gradient_accumulation_steps
    return Speed(
        gpu=gpu or name_of(recipe.memory),
        watts=watts,
        system=system,
        seconds_per_step=roofline.seconds_per_step(operations, rates, count, system),
        tokens_per_step=count * train.per_device_train_batch_size * recipe.data.max_length,
        flops_per_step=int(roofline.sum_over_step(operations, count, lambda operation: operation.flops)),
        launches_per_step=int(roofline.sum_over_step(operations, count, lambda operation: operation.launches)),
        physical_limit_seconds_per_step=roofline.sum_over_step(operations, count, rates.seconds_at_peak),
    )


def speeds_by_power_limit(recipe: Recipe, work: Work) -> list[Speed]:
    """Return the predicted speed at each power limit of the recipe's card, the highest first; none if its rates are unknown."""
    limits = sorted(card_of(recipe.memory).fp16_tflops, reverse=True)
    return [predict_speed(recipe, work, watts=watts) for watts in limits]


def card_rates(gpu: Gpu, watts: int, *, fp16_accumulation: bool = False) -> Rates:
    """Return the peak rates of a card under a power limit, with TF32 off, which is PyTorch's default."""
    gain = gpu.fp16_accumulation_gain if fp16_accumulation else 1.0
    return Rates(
        half_tflops=gpu.fp16_tflops[watts] * gain,
        single_tflops=gpu.fp32_tflops[watts],
        gb_per_second=gpu.gb_per_second,
        half_on_tensor_cores=gpu.tensor_cores,
        launch_seconds=gpu.launch_seconds,
    )
