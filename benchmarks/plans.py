"""Plans recipes in separate processes, two at a time, because a plan is single-threaded and takes seconds."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from benchmarks.suite import RECIPES
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results.baseline import BASELINE_TOKENS
from lowvram_chat.results.record import Metric

WORKERS = 2
MAX_CURVE_POINTS = 160
"""Points of a memory curve in a result; each is the maximum of its interval."""


@dataclass(frozen=True)
class Planned:
    """The figures of a plan: a recipe's memory and time."""

    memory: dict[str, float]
    """`on_card`, `reserved`, `allocated` (MiB), `micro_batch` (rows); per system `limit_`, `spare_` (MiB), `fits_` (1 or 0)."""
    speed: dict[str, float]
    """Per power limit `tokens_per_second_`, `step_` (ms), `three_baseline_epochs_`, `limit_three_baseline_epochs_` (h).

    The last is the time of the matrix products alone, at the card's peak rate."""
    series: dict[str, list[float]]
    """Category -> its MiB over the run."""


class Meaning(TypedDict):
    """What a figure is: the fields of a metric that its name implies."""

    unit: str
    better: NotRequired[Literal["lower", "higher", "same"]]
    tolerance: NotRequired[float]


class Plans:
    """Makes plans on demand; those that are requested early are made side by side."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_hide_gpus)
        self.requested: dict[tuple[str, tuple[str, ...]], Future[Planned]] = {}

    def request(self, recipe: str, *overrides: str) -> Future[Planned]:
        """Start to plan a recipe of the suite, unless that was requested before, and return its future."""
        key = (recipe, overrides)
        if key not in self.requested:
            self.requested[key] = self.pool.submit(planned, recipe, overrides)
        return self.requested[key]

    def largest_micro_batches(self, recipe: str) -> dict[str, int]:
        """Return the most rows of a micro-batch that fit, for "linux" and "windows"."""
        return self.pool.submit(_largest_micro_batches, recipe).result()

    def wait(self) -> None:
        """Wait for all requested plans, so that whatever is timed next has the machine to itself."""
        wait(self.requested.values())

    def close(self) -> None:
        """Cancel the plans that have not started."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _hide_gpus() -> None:
    """Hide the GPU from a planning process: libraries open it when they are imported, and another case may measure it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def _largest_micro_batches(name: str) -> dict[str, int]:
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.planning.search import largest_micro_batch
    from lowvram_chat.recipe.card import limits_of

    recipe = load_recipe(RECIPES[name])
    return {system: largest_micro_batch(recipe, system, make_plan) for system in limits_of(recipe.memory)}


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
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.planning.search import planned_micro_batch
    from lowvram_chat.reporting.memory_plot import memory_series
    from lowvram_chat.timing.speed import speeds_by_power_limit
    from lowvram_chat.units import MIB

    recipe = apply_change(recipe, planned_micro_batch(recipe, make_plan))
    plan = make_plan(recipe)
    memory = {
        "on_card": plan.on_card_bytes / MIB,
        "reserved": plan.peak_reserved_bytes / MIB,
        "allocated": plan.peak_allocated_bytes / MIB,
        "micro_batch": recipe.train.per_device_train_batch_size,
    }
    for system, limit in plan.limits.items():
        memory[f"limit_{system}"] = limit / MIB - CONTEXT_MIB
        memory[f"spare_{system}"] = (limit - plan.on_card_bytes_on(system)) / MIB
        memory[f"fits_{system}"] = float(plan.fits_on[system])
    speed = {}
    for predicted in speeds_by_power_limit(recipe, plan.work):
        watts = f"{predicted.watts}w"
        speed[f"tokens_per_second_{watts}"] = predicted.tokens_per_second
        speed[f"step_{watts}"] = 1000 * predicted.seconds_per_step
        hours = 3 * (BASELINE_TOKENS / predicted.tokens_per_second) / 3600
        speed[f"three_baseline_epochs_{watts}"] = hours
        speed[f"limit_three_baseline_epochs_{watts}"] = hours * predicted.utilisation
    curves = _thinned(memory_series(recipe)[0])
    return Planned({k: round(v, 1) for k, v in memory.items()}, {k: round(v, 3) for k, v in speed.items()}, curves)


def _thinned(allocated: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the curves at the point of each interval where their sum is highest, so that they still add up."""
    sums = [sum(values) for values in zip(*allocated.values(), strict=True)]
    interval = -(-len(sums) // MAX_CURVE_POINTS)
    points = [
        max(range(start, min(start + interval, len(sums))), key=sums.__getitem__)
        for start in range(0, len(sums), interval)
    ]
    return {name: [round(values[point], 1) for point in points] for name, values in allocated.items() if any(values)}


def metrics(figures: dict[str, float]) -> dict[str, Metric]:
    """Return predicted figures as metrics. They are deterministic, so the tolerance only sets which change is reported."""
    return {name: Metric(value=value, kind="predicted", **_meaning(name)) for name, value in figures.items()}


def _meaning(name: str) -> Meaning:
    """Return a figure's unit, which way is better, and from which relative change on it is reported."""
    meanings: dict[str, Meaning] = {
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
    return next(meaning for prefix, meaning in meanings.items() if name.startswith(prefix))
