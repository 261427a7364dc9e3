"""Settings fixed by the checkpoint, and those that a resumed run may change."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from lowvram_chat.errors import UsageError
from lowvram_chat.recipe.schema import Data, OptimizerSection, Recipe
from lowvram_chat.training.checkpoints import step_of
from lowvram_chat.training.run_dir import RunDir

log = logging.getLogger(__name__)

FIXED_BY_CHECKPOINT: Mapping[str, set[str]] = {
    # the weights
    "model": {"name", "revision", "dtype", "load_in"},
    "adapter": {"kind", "r", "alpha", "target_modules"},
    # the rows and their order
    "data": {*Data.model_fields} - {"eval_source", "eval_split", "eval_limit", "max_bad_rows", "attention_mask"},
    "train": {"seed", "learning_rate"},  # the states of the optimizer and the schedule hold the rate
    "optimizer": {*OptimizerSection.model_fields},
}
"""Settings that a resumed run must share with the run it continues, besides the effective batch size."""

SET_BY_PLANNER = (
    "micro_batch",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
)
"""Settings of `train` that `train.micro_batch: planned` decides."""


def check_resumed(run: RunDir, recipe: Recipe) -> None:
    """Refuse to resume a run with settings that its last checkpoint does not belong to.

    Raises:
        UsageError: with every such setting and its former value; nothing is changed.
    """
    before = run.recipe()
    problems = [
        f"  {name}={_yaml_value(new)} (was {_yaml_value(old)})"
        for name, old, new in changed_settings(before, recipe)
        if _is_fixed(name)
    ]
    rows, rows_before = recipe.train.effective_batch_size, before.train.effective_batch_size
    if rows != rows_before:
        problems.append(
            f"  train.per_device_train_batch_size x train.gradient_accumulation_steps={rows} (was {rows_before})"
        )
    if problems:
        raise UsageError(
            f"{run.path}: --resume needs the model, rows and optimizer of the checkpoint, but this recipe changes:\n"
            + "\n".join(problems)
            + f"\nRestore these settings (all of them: {run.recipe_file}), or start again with --overwrite or another output.dir."
        )
    checkpoint, last = run.last_checkpoint(), recipe.train.max_steps
    step = 0 if checkpoint is None else step_of(checkpoint)
    if last is not None and step > last:
        raise UsageError(
            f"train.max_steps: {last}, but the last checkpoint of {run.path} is from step {step}. Set it to {step} or more."
        )


def is_same(before: Recipe, recipe: Recipe) -> bool:
    """Return whether a run's resolved recipe came from this recipe."""
    if recipe.train.micro_batch == "planned" and recipe.train.effective_batch_size == before.train.effective_batch_size:
        decided = {name: getattr(before.train, name) for name in SET_BY_PLANNER}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=decided)})
    return before == recipe


def changed_settings(before: Recipe, after: Recipe) -> Iterator[tuple[str, object, object]]:
    """Yield (section.setting, old value, new value) of each setting in which two recipes differ."""
    old, new = before.model_dump(), after.model_dump()
    for section in new:
        old_section, new_section = old[section], new[section]
        if (old_section is None) != (new_section is None):  # the adapter was added or removed
            yield section, old_section and old_section["kind"], new_section and new_section["kind"]
            continue
        for name, value in (new_section or {}).items():
            if old_section[name] != value:
                yield f"{section}.{name}", old_section[name], value


def fixed_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings that a resumed run must share with the run it continues, with their values."""
    tree = recipe.model_dump(mode="json")
    return {
        f"{section}.{name}": tree[section][name]
        for section, names in FIXED_BY_CHECKPOINT.items()
        if tree[section] is not None
        for name in sorted(names)
    } | {"effective_batch_size": recipe.train.effective_batch_size}


def log_changes(run: RunDir, recipe: Recipe) -> None:
    """Log the settings in which a resumed run differs from the run it continues."""
    for name, old, new in changed_settings(run.recipe(), recipe):
        log.info("resuming with %s = %s (was %s)", name, _yaml_value(new), _yaml_value(old))


def _is_fixed(name: str) -> bool:
    section, _, setting = name.partition(".")
    return not setting or setting in FIXED_BY_CHECKPOINT.get(section, set())


def _yaml_value(value: object) -> str:
    """Return a value as it is written in a recipe."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
