"""Runs a recipe to its end; when the device runs out of memory, stops with advice or halves the micro-batch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lowvram_chat.errors import CompilationError, OutOfMemory, SubstitutionError
from lowvram_chat.model.calibration import device_name, without_failed
from lowvram_chat.model.out_of_memory import is_out_of_memory, phase_of
from lowvram_chat.planning.plan import Plan
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.bitsandbytes_states import forget_earlier_optimizers
from lowvram_chat.training.budget import plan_within_budget
from lowvram_chat.training.halving import HALVED_PHASES, advice, halve, micro_batch_overrides
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.session import Session

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, device: torch.device, resume: bool, force: bool = False) -> dict[str, Any]:
    """Train by a recipe and return what `result.json` holds.

    Raises:
        LowVramError: as `Session.prepare`.
        DoesNotFit: the run is predicted not to fit its card, and `force` is not given.
        OutOfMemory: the device ran out of memory and `memory.on_oom` is "stop", or there is nothing left to halve.
    """
    recipe = without_failed(recipe, device_name(device))
    recipe, plan = plan_within_budget(recipe, device, force=force)
    try:
        return _train(recipe, plan, device=device, resume=resume, force=force)
    finally:
        forget_earlier_optimizers()  # in a notebook too, where the process goes on after an error or Ctrl-C


def _train(recipe: Recipe, plan: Plan | None, *, device: torch.device, resume: bool, force: bool) -> dict[str, Any]:
    """Run sessions until one ends, each with what the one before could not do changed. Raises as `train`."""
    rows = None
    while True:
        session = None
        try:
            session = Session.prepare(recipe, device=device, rows=rows, plan=plan)
            result = session.run(resume=resume)
            leave_process_group()
            return result
        except SubstitutionError as error:
            switched_off = [setting for setting in error.settings if _is_on(recipe, setting)]
            if not switched_off:
                raise
            changed = _switch_off(recipe, switched_off)
            log.warning("%s", error)
            instead = " and ".join(INSTEAD[setting] for setting in switched_off)
            log.warning("continuing with %s, more memory and more time", instead)
        except CompilationError as error:
            if recipe.train.compile != "if_possible":
                raise
            log.warning("%s", error)
            log.warning("continuing uncompiled, which is slower")
            changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = halve(recipe) if phase_of(error) in HALVED_PHASES else None
            if recipe.memory.on_oom == "stop" or smaller is None:
                raise OutOfMemory(advice(recipe, error)) from None
            changed = smaller
            log.warning("out of memory: continuing with %s", micro_batch_overrides(changed))
            force = True  # a run that has begun goes on, whatever the new plan says
            # Before its start, the checkpoints in the folder are those of the run that it continues or replaces.
            resume = RunDir.of(recipe).last_checkpoint() is not None if session and session.started else resume
        # Outside the handler, because the error keeps the failed step's tensors alive.
        rows, recipe = rows if session is None else session.rows, changed
        del session
        release_memory(device)
        recipe, plan = plan_within_budget(recipe, device, force=force)


def release_memory(device: torch.device) -> None:
    """Free what a session that is over held on its device, and start its peaks again, so that they are the next session's."""
    forget_earlier_optimizers()
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def leave_process_group() -> None:
    """End the connection of a distributed run's processes: left to the interpreter's exit, a process may abort after its work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


INSTEAD: Mapping[str, str] = {
    "model.fused_loss": "the model's own loss",
    "adapter.fused": "PEFT's own adapters",
    "model.document_attention": "a document mask",
}
"""Setting that is switched off where it is not exact -> what takes its place."""


def _is_on(recipe: Recipe, setting: str) -> bool:
    """Return whether a setting of `INSTEAD` has an effect in this recipe."""
    section, _, name = setting.partition(".")
    if setting == "model.document_attention" and recipe.data.rows != "packed":
        return False
    return bool(getattr(getattr(recipe, section), name, False))


def _switch_off(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with these settings false."""
    for setting in settings:
        section, _, name = setting.partition(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: False})})
    return recipe
