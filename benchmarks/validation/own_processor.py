"""Predicts the steps of six runs on this machine's processor, and measures them.

The prediction knows the recipe and the rates that the self-test measures. These are measured right before and right after each
run and averaged, because the speed of a shared machine varies.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.selftest.rates import bandwidth, launch_latency, product_rate
from lowvram_chat.timing.processor import ProcessorRates, predicted_seconds

CPU = torch.device("cpu")
STEPS = 4
TINY: dict[str, Any] = {"model": {"name": "builtin:tiny-gpt2"}, "train": {"per_device_train_batch_size": 16}}
CASES: Mapping[str, dict[str, Any]] = {
    "tiny, full": TINY,
    "tiny, LoRA": TINY | {"adapter": {}},
    "GPT-2 small, full": {},
    "GPT-2 small, LoRA": {"adapter": {}},
    "GPT-2 small, packed": {"data": {"rows": "packed", "max_length": 512}, "train": {"per_device_train_batch_size": 1}},
    "GPT-2 small, checkpointed": {"train": {"gradient_checkpointing": True}},
}
"""Name of a run -> what it changes in `BASE`."""
BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "openai-community/gpt2", "dropout": 0.0},
    "data": {"source": "unused.jsonl", "max_length": 256},
    "train": {
        "precision": "fp32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "compile": False,
        "dataloader_num_workers": 0,
    },
    "optimizer": {"name": "adamw"},
}


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


def recipe_of(case: str) -> Recipe:
    """Return the recipe of a case."""
    changes = CASES[case]
    sections = {name: section | changes.get(name, {}) for name, section in BASE.items()}
    return Recipe.model_validate(changes | sections)


def predict_and_measure(case: str) -> OwnStep:
    """Return the predicted and the measured time of a case's step. It is meant for a process of its own."""
    from lowvram_chat.results.measure import measure_steps  # imports libraries that use a card where there is one

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
