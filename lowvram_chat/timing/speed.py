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
from lowvram_chat.timing.constants import SHARE_OF_BANDWIDTH, TRAINER_LAUNCHES
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
    range_of_seconds: tuple[float, float]
    """The shortest and the longest time of a step that are to be expected: nine in ten published speeds lie in this range."""
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
    def range_of_tokens_per_second(self) -> tuple[float, float]:
        """The lowest and the highest speed that are to be expected."""
        shortest, longest = self.range_of_seconds
        return self.tokens_per_step / longest, self.tokens_per_step / shortest

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
    arguments = (operations, rates, count, system)
    return Speed(
        gpu=gpu or name_of(recipe.memory),
        watts=watts,
        system=system,
        seconds_per_step=roofline.seconds_per_step(*arguments, host_launches=TRAINER_LAUNCHES),
        range_of_seconds=roofline.range_of_seconds(*arguments, host_launches=TRAINER_LAUNCHES),
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
    """Return the rates of a card under a power limit, with TF32 off, which is PyTorch's default."""
    gain = gpu.fp16_accumulation_gain if fp16_accumulation else 1.0
    half, single, bandwidth = gpu.fp16_tflops[watts], gpu.fp32_tflops[watts], gpu.gb_per_second
    if gpu.is_calibrated:
        half = roofline.peak_of(half, on_tensor_cores=gpu.tensor_cores)
        single = roofline.peak_of(single, on_tensor_cores=False)
        bandwidth /= SHARE_OF_BANDWIDTH
    return Rates(
        half_tflops=half * gain,
        single_tflops=single,
        gb_per_second=bandwidth,
        half_on_tensor_cores=gpu.tensor_cores,
        sustained_tflops=_sustained(gpu, watts),
        in_server=gpu.in_server,
        launch_seconds=gpu.launch_seconds,
    )


def _sustained(gpu: Gpu, watts: int) -> float:
    """Return the rate of half-precision products that a power limit sustains; no bound where the limit is unknown.

    Rates that were measured hold it already.
    """
    is_bound = watts and gpu.tensor_cores and not gpu.is_calibrated
    return roofline.sustained_tflops(watts, gpu.compute_capability) if is_bound else float("inf")
