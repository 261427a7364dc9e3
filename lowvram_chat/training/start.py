"""Checks before a run starts, made before anything heavy is imported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.resume import check_resumed, is_same
from lowvram_chat.training.run_dir import RunDir, check_new, is_main_process, read_result
from lowvram_chat.units import count

log = logging.getLogger(__name__)


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
    if not result or not is_same(run.recipe(), recipe):
        return {}
    log.info("%s: this run ended after %s, so there is nothing to resume", run.path, count(result["steps"], "step"))
    return result
