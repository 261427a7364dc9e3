"""Predicts the steps of runs on this machine's processor, and measures them.

The prediction knows the recipe and the rates that the self-test measures. These are measured right before and right after each
run and averaged, because the speed of a shared machine varies.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.validation.own_runs import recipe_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results.measure import measure_steps
from lowvram_chat.selftest.rates import bandwidth, launch_latency, product_rate
from lowvram_chat.timing.processor import ProcessorRates, predicted_seconds

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class OwnStep:
    """A step's time, predicted and measured, in seconds."""

    recipe: Recipe
    predicted: float
    measured: list[float]

    @property
    def error(self) -> float:
        """(predicted - measured) / measured, of the median step."""
        return self.predicted / statistics.median(self.measured) - 1


def predict_and_measure(case: str) -> OwnStep:
    """Return the predicted and the measured time of a case's step. It is meant for a process of its own."""
    recipe = recipe_of(case)
    before = _measured_rates()
    measured = measure_steps(recipe, STEPS, "speed")["seconds"]
    after = _measured_rates()
    rates = ProcessorRates(
        single_tflops=(before.single_tflops + after.single_tflops) / 2,
        gb_per_second=(before.gb_per_second + after.gb_per_second) / 2,
        launch_seconds=(before.launch_seconds + after.launch_seconds) / 2,
    )
    return OwnStep(recipe=recipe, predicted=predicted_seconds(recipe, rates), measured=measured)


def _measured_rates() -> ProcessorRates:
    return ProcessorRates(
        single_tflops=product_rate(CPU, torch.float32),
        gb_per_second=bandwidth(CPU).figures["bandwidth"].value,
        launch_seconds=1e-6 * launch_latency(CPU).figures["launch"].value,
    )
