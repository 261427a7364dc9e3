"""Checks before a run starts, made before anything heavy is imported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from lowvram_chat.errors import UsageError
from lowvram_chat.locks import owned
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.new_run import check_new, check_sources_outside
from lowvram_chat.training.resume import changed_settings, check_resumed, is_same
from lowvram_chat.training.run_dir import RunDir, is_main_process, read_result
from lowvram_chat.units import count

log = logging.getLogger(__name__)


@contextlib.contextmanager
def owned_run(recipe: Recipe) -> Iterator[None]:
    """Own the run folder of a recipe while the context is open, in the process that writes it.

    Raises:
        UsageError: another process owns it.
    """
    if not is_main_process():
        yield
        return
    with owned(RunDir.of(recipe).path, "Wait until it has ended, or set output.dir to another folder."):
        yield


def check_start(recipe: Recipe, *, resume: bool, overwrite: bool) -> RunDir:
    """Return the run folder of a recipe, which need not exist yet.

    Raises:
        UsageError: the folder is in use, or the recipe is not that of the run to resume.
        NotFoundError: there is no complete checkpoint to resume from.
    """
    run = RunDir.of(recipe)
    if is_main_process():
        check_new(run.path, overwrite=overwrite, resume=resume)
        if not resume:
            check_sources_outside(recipe)
        if resume:
            check_resumed(run, recipe)
    return run


def finished_result(run: RunDir, recipe: Recipe) -> dict[str, Any]:
    """Return the result of a run that has finished with this recipe; empty if there are steps left.

    Settings that differ from the finished run's have no effect without further steps, so `recipe.yaml` is left as it was.
    """
    try:
        result = read_result(run)
    except UsageError:
        log.warning("%s: is damaged, so it is written again", run.result_file)
        result = {}
    before = run.recipe()
    last = recipe.train.max_steps
    if not result or not (is_same(before, recipe) or (last is not None and result["steps"] >= last)):
        return {}
    for name, old, new in changed_settings(before, recipe) if not is_same(before, recipe) else ():
        log.warning("%s = %s has no effect: the run ended with %s", name, new, old)
    log.info("%s: this run ended after %s, so there is nothing to resume", run.path, count(result["steps"], "step"))
    return result
