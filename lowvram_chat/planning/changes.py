"""Changes to a recipe, as `section.key=value` words that a user can paste."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowvram_chat.recipe.schema import Adapter, Recipe

Change = Mapping[str, Any]
"""`section.key` -> value."""


def apply_change(recipe: Recipe, change: Change) -> Recipe:
    """Returns the recipe with a change made."""
    for path, value in change.items():
        name, _, key = path.partition(".")
        section = getattr(recipe, name)
        new = Adapter(**{key: value}) if section is None else section.model_copy(update={key: value})
        recipe = recipe.model_copy(update={name: new})
    return recipe


def as_overrides(change: Change) -> str:
    """Returns a change as words for the command line."""
    return " ".join(f"{path}={_override_value(value)}" for path, value in change.items())


def micro_batch_changes(recipe: Recipe) -> Iterator[Change]:
    """Yields the ways to cut an optimizer step into fewer or more micro-batches, the fewest first."""
    train = recipe.train
    rows = train.effective_batch_size
    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        yield {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": rows // size}


def free_savings(recipe: Recipe) -> Change:
    """Returns the substitutions that save memory and take no time: they are the same function."""
    change: dict[str, Any] = {}
    if not recipe.model.fused_gelu:
        change["model.fused_gelu"] = True
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


def _override_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
