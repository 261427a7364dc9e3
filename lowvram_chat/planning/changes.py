"""Changes to a recipe, as `section.key=value` overrides that a user can paste."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lowvram_chat.gpus import this_system
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Adapter, Recipe

Change = Mapping[str, str | int | bool]
"""`section.key` -> value."""

LIGHTER_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adamw_unfused": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "adamw": ("adamw_8bit", "paged_adamw_8bit"),
    "adamw_8bit": ("paged_adamw_8bit",),
}
"""Optimizer -> those with smaller states that take the same kind of step."""


def apply_change(recipe: Recipe, change: Change) -> Recipe:
    """Return the recipe with a change applied."""
    for path, value in change.items():
        name, _, key = path.partition(".")
        section = getattr(recipe, name)
        new = Adapter.model_validate({key: value}) if section is None else section.model_copy(update={key: value})
        recipe = recipe.model_copy(update={name: new})
    return recipe


def as_overrides(change: Change) -> str:
    """Return a change as words for the command line."""
    return " ".join(f"{path}={_override_value(value)}" for path, value in change.items())


def micro_batch_changes(recipe: Recipe) -> Iterator[Change]:
    """Yield the ways to cut an optimizer step into micro-batches of equal size, the largest micro-batch first."""
    rows = recipe.train.effective_batch_size
    small = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    for size in sorted({*small, *(rows // size for size in small)}, reverse=True):
        yield {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": rows // size}


def free_savings(recipe: Recipe) -> Change:
    """Return the substitutions that save memory at no cost in time; they compute the same function."""
    change: dict[str, str | bool] = {}
    if not recipe.model.fused_gelu:
        change["model.fused_gelu"] = True
    if recipe.model.attention == "eager":
        change["model.attention"] = "sdpa"
    return change


def lighter_optimizers(recipe: Recipe) -> list[Change]:
    """Return the optimizers with smaller states that take the same kind of step; on Windows, where nothing is paged, no paged."""
    names = LIGHTER_OPTIMIZERS.get(recipe.optimizer.name, ())
    pages = this_system() != "windows"
    return [{"optimizer.name": name} for name in names if pages or not OPTIMIZERS[name].paged]


def _override_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
