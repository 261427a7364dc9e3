"""Recipes planned in processes of their own, two at a time: a plan is single-threaded and takes seconds."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from benchmarks.suite import RECIPES
from lowvram_chat.recipe.baseline import BASELINE_TOKENS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results.record import Metric

WORKERS = 2
PLACES = 160
"""Of a memory curve that is kept: each the most of its stretch."""


@dataclass(frozen=True)
class Planned:
    """What a plan says of a recipe's memory and time."""

    memory: dict[str, float]
    """`on_card`, `reserved`, `allocated`, `micro_batch`, and for each system `limit_`, `spare_` (MiB), `fits_` (1 or 0)."""
    speed: dict[str, float]
    """For each power limit `tokens_per_second_`, `step_` (ms), `three_baseline_epochs_`, `limit_three_baseline_epochs_` (h)."""
    series: dict[str, list[float]]
    """MiB by category over a run."""


class Plans:
    """Plans on demand; those that are asked for early are made side by side."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_without_a_card)
        self.asked: dict[tuple[str, tuple[str, ...]], Future[Planned]] = {}

    def ask(self, recipe: str, *overrides: str) -> Future[Planned]:
        """Begin to plan a recipe of the suite."""
        key = (recipe, overrides)
        if key not in self.asked:
            self.asked[key] = self.pool.submit(planned, recipe, overrides)
        return self.asked[key]

    def largest_micro_batches(self, recipe: str) -> dict[str, int]:
        """Return "linux", "windows" -> the most rows of a micro-batch that fit."""
        return self.pool.submit(_largest_micro_batches, recipe).result()

    def wait(self) -> None:
        """Return when all that was asked is planned: what is timed next has the machine to itself."""
        wait(self.asked.values())

    def close(self) -> None:
        """Stop what has not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _without_a_card() -> None:
    """Keep a planning process off the card that another case measures: libraries look at it when they are imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def _largest_micro_batches(name: str) -> dict[str, int]:
    from lowvram_chat.planning.plan import card_limits
    from lowvram_chat.planning.search import largest_micro_batch

    recipe = load_recipe(RECIPES[name])
    return {system: largest_micro_batch(recipe, system) for system in card_limits(recipe)}


def planned(name: str, overrides: tuple[str, ...] = ()) -> Planned:
    """Return the plan of a recipe of the suite."""
    from lowvram_chat.quiet import quiet_libraries, quiet_transformers

    quiet_libraries()
    quiet_transformers()
    return plan_of(load_recipe(RECIPES[name], overrides))


def plan_of(recipe: Recipe) -> Planned:
    """Return the plan of a recipe."""
    from lowvram_chat.gpus import CONTEXT_MIB
    from lowvram_chat.planning.changes import apply_change
    from lowvram_chat.planning.plan import make_plan
    from lowvram_chat.planning.search import planned_micro_batch
    from lowvram_chat.reporting.memory_plot import memory_series
    from lowvram_chat.timing.speed import speeds_by_power_limit
    from lowvram_chat.units import MIB

    recipe = apply_change(recipe, planned_micro_batch(recipe))
    made = make_plan(recipe)
    memory = {
        "on_card": made.on_card_bytes / MIB,
        "reserved": made.peak_reserved_bytes / MIB,
        "allocated": made.peak_allocated_bytes / MIB,
        "micro_batch": recipe.train.per_device_train_batch_size,
    }
    for system, limit in made.limits.items():
        memory[f"limit_{system}"] = limit / MIB - CONTEXT_MIB
        memory[f"spare_{system}"] = (limit - made.on_card_bytes) / MIB
        memory[f"fits_{system}"] = float(made.fits_on[system])
    speed = {}
    for predicted in speeds_by_power_limit(recipe, made.work):
        watts = f"{predicted.watts}w"
        speed[f"tokens_per_second_{watts}"] = predicted.tokens_per_second
        speed[f"step_{watts}"] = 1000 * predicted.seconds_per_step
        hours = 3 * (BASELINE_TOKENS / predicted.tokens_per_second) / 3600
        speed[f"three_baseline_epochs_{watts}"] = hours
        speed[f"limit_three_baseline_epochs_{watts}"] = hours * predicted.utilisation
    curves = _thinned(memory_series(recipe)[0])
    return Planned({k: round(v, 1) for k, v in memory.items()}, {k: round(v, 3) for k, v in speed.items()}, curves)


def _thinned(allocated: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the curves at the place of each stretch where their sum is highest, so that they still add up."""
    sums = [sum(values) for values in zip(*allocated.values(), strict=True)]
    step = -(-len(sums) // PLACES)
    places = [
        max(range(start, min(start + step, len(sums))), key=sums.__getitem__) for start in range(0, len(sums), step)
    ]
    return {name: [round(values[place], 1) for place in places] for name, values in allocated.items() if any(values)}


def metrics(figures: dict[str, float]) -> dict[str, Metric]:
    """Return predicted figures as metrics: deterministic, so that the tolerance only says what is worth a word."""
    return {name: Metric(value=value, kind="predicted", **_meaning(name)) for name, value in figures.items()}


def _meaning(name: str) -> dict[str, Any]:
    """Return a figure's unit, which way is better, and what change is worth a word."""
    starts: dict[str, dict[str, Any]] = {
        "on_card": {"unit": "MiB", "better": "lower", "tolerance": 0.01},
        "reserved": {"unit": "MiB", "better": "lower", "tolerance": 0.01},
        "allocated": {"unit": "MiB", "better": "lower", "tolerance": 0.01},
        "micro_batch": {"unit": "rows"},
        "largest_micro_batch": {"unit": "rows", "better": "higher"},
        "limit_three": {"unit": "h"},
        "limit_": {"unit": "MiB"},
        "spare_": {"unit": "MiB"},
        "fits_": {"unit": "1", "better": "higher"},
        "tokens_per_second": {"unit": "tokens/s", "better": "higher", "tolerance": 0.01},
        "step_": {"unit": "ms"},
        "three_baseline": {"unit": "h", "better": "lower", "tolerance": 0.01},
    }
    return next(meaning for start, meaning in starts.items() if name.startswith(start))
