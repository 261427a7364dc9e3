"""The predicted time of the published baseline's work on the RTX 3050 Laptop is below the published 7 h 27 m.

The work is three epochs. On a CUDA machine, test_vram.py measures the same recipes and keeps their speed with its prediction.
"""

from __future__ import annotations

import pytest

from benchmarks.plans import Plans, metrics
from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results.baseline import BASELINE_SECONDS

PUBLISHED_HOURS = BASELINE_SECONDS / 3600
OWN_RECIPE_ERROR = 0.12
"""How far the prediction of the baseline's own recipe may be from its published time."""
LORA = ("adapter.kind=lora",)
MAX_HOURS = {"fast_fp16": 3.25, f"fast_fp16 {LORA[0]}": 2.0}
"""The longest time at 80 W that passes, for the fastest recipe, full and as LoRA; the others must beat the baseline."""
GPT2 = [name for name in RECIPES if load_recipe(RECIPES[name]).model.name == "openai-community/gpt2"]
CASES = [*((name, ()) for name in GPT2), ("fast_fp16", LORA)]
WATTS = (80, 55, 40)


@pytest.mark.parametrize(("recipe", "overrides"), CASES, ids=[" ".join([name, *words]) for name, words in CASES])
def test_a_recipe_is_faster_than_the_baseline(
    recipe: str, overrides: tuple[str, ...], keeper: Keeper, plans: Plans
) -> None:
    case, speed = " ".join([recipe, *overrides]), plans.request(recipe, *overrides).result().speed
    problem = _problem(case, speed["three_baseline_epochs_80w"])
    settings = load_recipe(RECIPES[recipe], overrides)
    record = keeper.keep("baseline", case, metrics(speed), problem=problem, recipe=settings)
    assert record.status == "passed", record.reason


def _problem(case: str, hours: float) -> str | None:
    """Return why a predicted time fails, None where it passes."""
    if (
        case == "baseline_7h27m"
    ):  # the baseline's own recipe must take the published time, within the time model's error
        error = hours / PUBLISHED_HOURS - 1
        return None if abs(error) <= OWN_RECIPE_ERROR else f"{hours:.2f} h, published {PUBLISHED_HOURS:.2f}"
    limit = MAX_HOURS.get(case, PUBLISHED_HOURS)
    return None if hours <= limit else f"{hours:.2f} h at 80 W, at most {limit:.2f} expected"


def test_less_power_takes_longer_and_nothing_beats_the_peak_rate(plans: Plans) -> None:
    speed = plans.request("fast_fp16").result().speed
    hours = [speed[f"three_baseline_epochs_{watts}w"] for watts in WATTS]
    assert hours == sorted(hours)
    assert all(
        speed[f"limit_three_baseline_epochs_{watts}w"] < speed[f"three_baseline_epochs_{watts}w"] for watts in WATTS
    )
