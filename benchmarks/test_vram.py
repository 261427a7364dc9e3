"""Each recipe fits its 4 GB card. This is predicted everywhere and, on a CUDA machine, also measured under the card's limit.

A case that runs out of memory is a result too: its record says so, and its test fails.
"""

from __future__ import annotations

import pytest

from benchmarks.plans import Plans, metrics
from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.gpus import CONTEXT_MIB, this_system
from lowvram_chat.recipe.card import limits_of
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results import own_run
from lowvram_chat.results.record import Metric, Record
from lowvram_chat.units import MIB

MIN_SPARE_MIB = 150
"""MiB that a shipped recipe must leave free on Linux."""
OTHER_CARDS = ("gtx-1650-laptop-4gb", "rtx-3050-laptop-6gb")
"""One without tensor cores, and one with more memory."""
MAX_OVER_PREDICTION = 1.02
"""The ratio of the measured to the predicted peak that passes."""
STEPS = 10
"""Steps of a measurement on a GPU; the peak comes within the first two."""


def keep_vram(keeper: Keeper, plans: Plans, name: str, *overrides: str) -> Record:
    """Plan a recipe and return the record of its case, which fails where the run leaves less than `MIN_SPARE_MIB`."""
    planned = plans.request(name, *overrides).result()
    recipe = load_recipe(RECIPES[name], overrides)
    spare = planned.memory["spare_linux"]
    problem = None if spare >= MIN_SPARE_MIB else f"{spare:,.0f} MiB free on Linux, at least {MIN_SPARE_MIB} expected"
    case = " ".join([name, *overrides])
    return keeper.keep("vram", case, metrics(planned.memory), problem=problem, recipe=recipe, series=planned.series)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_card_with_room_to_spare(recipe: str, keeper: Keeper, plans: Plans) -> None:
    record = keep_vram(keeper, plans, recipe)
    assert record.status == "passed", record.reason


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_the_largest_micro_batch_of_a_recipe(name: str, keeper: Keeper, plans: Plans) -> None:
    largest = plans.largest_micro_batches(name)
    rows = {f"largest_micro_batch_{system}": float(count) for system, count in largest.items()}
    record = keeper.keep("micro_batch", name, metrics(rows), recipe=load_recipe(RECIPES[name]))
    assert min(rows.values()) >= 1, record


@pytest.mark.full
@pytest.mark.parametrize("card", OTHER_CARDS)
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_takes_of_another_card(name: str, card: str, keeper: Keeper, plans: Plans) -> None:
    futures = {other: plans.request(name, f"memory.gpu={other}") for other in OTHER_CARDS}  # planned side by side
    figures = futures[card].result()
    recipe = load_recipe(RECIPES[name], [f"memory.gpu={card}"])
    keeper.keep("vram", f"{name} on {card}", metrics(figures.memory), recipe=recipe)


def test_a_recipe_that_is_too_large_fails_its_case(plans: Plans, keeper: Keeper) -> None:
    separate = Keeper(keeper.root, keeper.results, store=False)
    record = keep_vram(separate, plans, "full_fp16", "train.per_device_train_batch_size=32")
    assert record.status == "failed"
    assert record.value("fits_linux") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_measured_on_this_card_stays_within_its_limit(recipe: str, keeper: Keeper) -> None:
    settings = load_recipe(RECIPES[recipe])
    limit_mib = limits_of(settings.memory)[this_system()] // MIB
    limited = settings.model_copy(update={"memory": settings.memory.model_copy(update={"limit_mib": limit_mib})})
    record = own_run.measure_recipe(limited, recipe, STEPS)
    ran_out = record.status == "out_of_memory"
    keeper.keep("run", recipe, record.metrics, problem=record.reason, out_of_memory=ran_out, recipe=limited)
    assert record.status == "passed", record.reason
    reserved, predicted = record.metrics["reserved"].value, record.metrics["predicted_reserved"].value
    assert reserved <= limit_mib - CONTEXT_MIB, own_run.summary_sentence(record)
    if not (record.recipe or {}).get("train", {}).get("compile"):  # memory is planned without compilation
        assert reserved <= predicted * MAX_OVER_PREDICTION, own_run.summary_sentence(record)


def test_metrics_know_every_figure_of_a_plan(plans: Plans) -> None:
    planned = plans.request("quickstart").result()
    known = metrics(planned.memory | planned.speed)
    assert all(isinstance(metric, Metric) and metric.kind == "predicted" for metric in known.values())
