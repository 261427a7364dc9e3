"""What a run may take of its card: planned before it starts, held to while it runs, compared when it has ended."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from lowvram_chat.errors import DoesNotFit
from lowvram_chat.gpus import CONTEXT_MIB, GPUS
from lowvram_chat.planning import report
from lowvram_chat.planning.changes import apply_change, as_overrides
from lowvram_chat.planning.plan import Plan, make_plan
from lowvram_chat.planning.search import advise, planned_micro_batch
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.oom import micro_batch_overrides
from lowvram_chat.units import MIB

log = logging.getLogger(__name__)

USABLE_SHARE = {"win32": 0.95}
"""Share of a card that no recipe names which this process may take; elsewhere 0.97."""


def plan_within_budget(recipe: Recipe, device: torch.device, *, force: bool) -> tuple[Recipe, Plan | None]:
    """Return the recipe with its micro-batch planned, where it asks for that, and the run's plan; on CUDA, hold the
    process to its budget.

    On a CPU a run is planned only where its recipe has a memory section or asks for a planned micro-batch: it would be
    refused for a card it never sees. Windows would spill beyond the budget and run tens of times slower instead of failing.

    Raises:
        DoesNotFit: with the changes that make it fit; `force` goes on all the same.
    """
    if device.type != "cuda" and not recipe.memory.model_fields_set and recipe.train.micro_batch == "given":
        return recipe, None
    recipe = with_planned_micro_batch(recipe, device)
    here = _with_limit(recipe, device)
    planned = make_plan(here)
    log.info("predicted: %s", report.verdict(here, planned).replace("\n", "\n           "))
    if not planned.fits and not force:
        raise DoesNotFit(_refusal(here, planned))
    _set_memory_cap(planned.limit_bytes, device)
    return recipe, planned


def with_planned_micro_batch(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with `train.micro_batch: planned` carried out for this device; others as they are."""
    if recipe.train.micro_batch == "given":
        return recipe
    recipe = apply_change(recipe, planned_micro_batch(_with_limit(recipe, device)))
    log.info(
        "planned: %s%s", micro_batch_overrides(recipe), ", checkpointed" if recipe.train.gradient_checkpointing else ""
    )
    return recipe


def cap_process_memory(recipe: Recipe, device: torch.device) -> None:
    """Hold the process to the recipe's budget on CUDA, planned or not."""
    if device.type == "cuda":
        _set_memory_cap(MIB * (_with_limit(recipe, device).memory.limit_mib or 0), device)


def _set_memory_cap(limit_bytes: int, device: torch.device) -> None:
    if device.type == "cuda":
        allowed = max(limit_bytes - CONTEXT_MIB * MIB, 0)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def _with_limit(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with its budget on this card in `memory.limit_mib`: its own, its named card's, or the card's.

    On a CPU it is as it was: planned for the card that it names.
    """
    if device.type != "cuda":
        return recipe
    memory, total_mib = recipe.memory, torch.cuda.get_device_properties(device).total_memory // MIB
    own = int(total_mib * USABLE_SHARE.get(sys.platform, 0.97))
    named = GPUS[memory.gpu].usable_windows_mib if sys.platform == "win32" else GPUS[memory.gpu].usable_linux_mib
    wanted = memory.limit_mib or (named if "gpu" in memory.model_fields_set else own)
    if wanted > own:
        log.info("this card has %d MiB: planning for %d, not for %d", total_mib, own, wanted)
    return recipe.model_copy(update={"memory": memory.model_copy(update={"limit_mib": min(wanted, own)})})


def _refusal(recipe: Recipe, planned: Plan) -> str:
    """Return why a run is refused and what would make it fit."""
    options = advise(recipe)
    if not options:
        return f"{report.too_large(recipe, planned)} --force starts it all the same."
    changes = "\n".join(
        f"  {as_overrides(option.change)}\n      {option.plan.on_card_bytes // MIB:,} MiB, a step about {option.cost:+.0%} in time"
        for option in options
    )
    return f"{report.verdict(recipe, planned)}\nAdd one of these, or --force to start all the same:\n{changes}"


def allocator_limit(planned: Plan | None) -> int | None:
    """Return the bytes that CUDA's allocator may take by the plan; None where nothing holds it."""
    return planned.limit_bytes - CONTEXT_MIB * MIB if planned is not None and torch.cuda.is_available() else None


def compare_with_plan(planned: Plan | None) -> dict[str, Any]:
    """Return predicted and measured peak for `result.json`; measured only on CUDA."""
    if planned is None:
        return {}
    predicted = planned.peak_reserved_bytes
    plan_of = {"predicted_reserved_bytes": predicted, "predicted_allocated_bytes": planned.peak_allocated_bytes}
    if not torch.cuda.is_available():
        return {"memory_plan": {**plan_of, "measured_reserved_bytes": None, "error_percent": None}}
    measured = torch.cuda.max_memory_reserved()
    error = round(100 * (predicted - measured) / measured, 2)
    log.info("peak reserved: %d MiB predicted, %d measured (%+.1f %%)", predicted // MIB, measured // MIB, error)
    return {"memory_plan": {**plan_of, "measured_reserved_bytes": measured, "error_percent": error}}
