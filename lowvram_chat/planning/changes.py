"""Changes to a recipe, as `section.key=value` words that a user can paste."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowvram_chat.recipe.schema import Adapter, Recipe

Change = Mapping[str, Any]
"""`section.key` -> value."""


def changed(recipe: Recipe, change: Change) -> Recipe:
    """Returns the recipe with a change made."""
    for path, value in change.items():
        name, _, key = path.partition(".")
        section = getattr(recipe, name)
        new = Adapter(**{key: value}) if section is None else section.model_copy(update={key: value})
        recipe = recipe.model_copy(update={name: new})
    return recipe


def words(change: Change) -> str:
    """Returns a change as words for the command line."""
    return " ".join(f"{path}={_word(value)}" for path, value in change.items())


def micro_batches(recipe: Recipe) -> Iterator[Change]:
    """Yields the ways to cut an optimizer step into fewer or more micro-batches, the fewest first."""
    train = recipe.train
    rows = train.rows_of_a_step
    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        yield {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": rows // size}


def without_cost(recipe: Recipe) -> Change:
    """Returns the substitutions that save memory and take no time: they are the same function."""
    change: dict[str, Any] = {}
    if not recipe.model.lean_gelu:
        change["model.lean_gelu"] = True
    if recipe.model.attention == "eager":
        change["model.attention"] = "sdpa"
    return change


def lighter_optimizers(recipe: Recipe) -> list[Change]:
    """Returns the optimizers with smaller states that do the same kind of step."""
    lighter = {
        "adamw_unfused": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
        "adamw": ("adamw_8bit", "paged_adamw_8bit"),
        "adamw_8bit": ("paged_adamw_8bit",),
    }
    return [{"optimizer.name": name} for name in lighter.get(recipe.optimizer.name, ())]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
