"""Checks before a run starts, made before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.resume import check_resumed, is_same
from lowvram_chat.training.run_dir import RunDir, check_new, is_main_process, read_result


def check_start(recipe: Recipe, *, resume: bool, overwrite: bool) -> RunDir:
    """Return the run folder of a recipe, which need not exist yet.

    Raises:
        UsageError: the folder is in use, or the recipe is not that of the run to resume.
        NotFoundError: there is no complete checkpoint to resume from.
    """
    run = RunDir(Path(recipe.output.dir))
    if is_main_process():
        check_new(run.path, overwrite=overwrite, resume=resume)
        if resume:
            check_resumed(run, recipe)
    return run


def finished_result(run: RunDir, recipe: Recipe) -> dict[str, Any]:
    """Return the result of a run that has finished with this recipe; empty if there are steps left."""
    result = read_result(run)
    return result if result and is_same(run.recipe(), recipe) else {}
