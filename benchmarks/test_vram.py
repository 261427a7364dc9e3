"""Does each recipe fit its 4 GB card? Predicted everywhere; on a CUDA machine measured too, under the card's limit.

A case that runs out of memory is a result: its record says so, and the test fails with it.
"""

from __future__ import annotations

import pytest

from benchmarks.plans import Plans, metrics
from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.memory.search import largest_micro_batch
from lowvram_chat.recipe.load import load_recipe
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results import own_run
from lowvram_chat.results.record import Metric, Record

SPARE_MIB = 150
"""What a shipped recipe leaves free on Linux."""
STEPS = 10
"""Of a measurement on a card: its peak stands within the first two."""


def keep_vram(keeper: Keeper, plans: Plans, name: str, *overrides: str, full: bool = False) -> Record:
    """Return the case of a recipe, planned: it fails where the run leaves less than `SPARE_MIB`."""
    planned = plans.ask(name, *overrides).result()
    recipe = load_recipe(RECIPES[name], overrides)
    spare = planned.memory["spare_linux"]
    problem = None if spare >= SPARE_MIB else f"{spare:,.0f} MiB to spare on Linux, {SPARE_MIB} wanted"
    figures = planned.memory | (_largest(recipe) if full else {})
    case = " ".join([name, *overrides])
    return keeper.keep("vram", case, metrics(figures), problem=problem, recipe=recipe, series=planned.series)


def _largest(recipe: Recipe) -> dict[str, float]:
    return {f"largest_micro_batch_{system}": largest_micro_batch(recipe, system) for system in ("linux", "windows")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_card_with_room_to_spare(recipe: str, keeper: Keeper, plans: Plans, full: bool) -> None:
    record = keep_vram(keeper, plans, recipe, full=full)
    assert record.status == "passed", record.reason


def test_a_recipe_that_is_too_large_fails_its_case(plans: Plans, keeper: Keeper) -> None:
    apart = Keeper(keeper.root, keeper.results, store=False)
    record = keep_vram(apart, plans, "full_fp16", "train.per_device_train_batch_size=32")
    assert record.status == "failed"
    assert record.value("fits_linux") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_measured_on_this_card_stays_within_its_limit(recipe: str, keeper: Keeper) -> None:
    settings = load_recipe(RECIPES[recipe])
    limit = settings.memory.model_copy(update={"limit_mib": settings.memory.limit_mib or 3891})
    record = own_run.measured(settings.model_copy(update={"memory": limit}), recipe, STEPS)
    keeper.keep(
        "run",
        recipe,
        record.metrics,
        problem=record.reason,
        out_of_memory=record.status == "out_of_memory",
        recipe=settings,
    )
    assert record.status == "passed", record.reason
    reserved, predicted = record.metrics["reserved"], record.metrics["predicted_reserved"]
    assert reserved.value <= _room(limit.limit_mib), own_run.sentence(record)
    assert reserved.value <= predicted.value * 1.02, own_run.sentence(record)  # promised to fit means that it fits


def _room(limit_mib: int | None) -> float:
    from lowvram_chat.recipe.gpus import CONTEXT_MIB

    return (limit_mib or 0) - CONTEXT_MIB


def test_metrics_know_every_figure_of_a_plan(plans: Plans) -> None:
    planned = plans.ask("quickstart").result()
    known = metrics(planned.memory | planned.speed)
    assert all(isinstance(metric, Metric) and metric.kind == "predicted" for metric in known.values())
