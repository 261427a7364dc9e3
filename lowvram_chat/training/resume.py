"""What a resumed run may change: all but what its checkpoint is a state of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lowvram_chat.errors import UsageError
from lowvram_chat.recipe.schema import Data, OptimizerSection, Recipe
from lowvram_chat.training.run_dir import RunDir, step_of

log = logging.getLogger(__name__)

FIXED_BY_CHECKPOINT: Mapping[str, set[str]] = {
    # the weights
    "model": {"name", "revision", "dtype", "load_in"},
    "adapter": {"kind", "r", "alpha", "target_modules"},
    # the rows and their order
    "data": {*Data.model_fields} - {"eval_source", "eval_split", "eval_limit", "max_bad_rows", "attention_mask"},
    "train": {"seed", "learning_rate"},  # the optimizer's and the schedule's state hold the rate
    "optimizer": {*OptimizerSection.model_fields},
}
"""Settings that must be those of the run that is gone on with; so must the rows of an optimizer step."""

SET_BY_PLANNER = ("micro_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
"""What `train.micro_batch: planned` decides."""


def check_resumed(run: RunDir, recipe: Recipe) -> None:
    """Refuse to go on with a run as something that its last checkpoint is no state of.

    Raises:
        UsageError: with every such setting, and what it was; nothing is changed.
    """
    before = run.recipe()
    problems = [
        f"  {name}={_yaml_value(now)} (was {_yaml_value(was)})"
        for name, was, now in changes(before, recipe)
        if _is_fixed(name)
    ]
    rows, rows_before = recipe.train.effective_batch_size, before.train.effective_batch_size
    if rows != rows_before:
        problems.append(
            f"  train.per_device_train_batch_size x train.gradient_accumulation_steps={rows} (was {rows_before})"
        )
    if problems:
        raise UsageError(
            f"{run.path}: --resume goes on with the same model, rows and optimizer, and this recipe has others:\n"
            + "\n".join(problems)
            + f"\nLeave them as they were (all of them: {run.recipe_file}), or start anew: --overwrite, or another output.dir."
        )
    checkpoint, last = run.last_checkpoint(), recipe.train.max_steps
    step = (checkpoint and step_of(checkpoint)) or 0
    if last is not None and step > last:
        raise UsageError(
            f"train.max_steps: {last}, but the last checkpoint of {run.path} is of step {step}. Set it to {step} or more."
        )


def is_same(before: Recipe, recipe: Recipe) -> bool:
    """Return whether a run's resolved recipe came from this one."""
    if recipe.train.micro_batch == "planned" and recipe.train.effective_batch_size == before.train.effective_batch_size:
        decided = {name: getattr(before.train, name) for name in SET_BY_PLANNER}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=decided)})
    return before == recipe


def changes(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield (section.setting, what it was, what it is) of each setting that two recipes differ in."""
    old, new = before.model_dump(), now.model_dump()
    for section in new:
        was, is_now = old[section], new[section]
        if (was is None) != (is_now is None):  # a whole adapter came or went
            yield section, was and was["kind"], is_now and is_now["kind"]
            continue
        yield from (
            (f"{section}.{name}", was[name], value) for name, value in (is_now or {}).items() if was[name] != value
        )


def tell_changes(run: RunDir, recipe: Recipe) -> None:
    """Say which settings of a resumed run differ from those it began with."""
    for name, was, now in changes(run.recipe(), recipe):
        log.info("resuming with %s = %s (was %s)", name, _yaml_value(now), _yaml_value(was))


def _is_fixed(name: str) -> bool:
    section, _, setting = name.partition(".")
    return not setting or setting in FIXED_BY_CHECKPOINT.get(section, set())


def _yaml_value(value: Any) -> str:
    """Return a value as a recipe says it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
