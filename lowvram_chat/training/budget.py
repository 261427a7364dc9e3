"""The memory budget of a run on its device: planned before the start, enforced on CUDA, compared with the measured peak."""

from __future__ import annotations

import logging
import sys

import torch

from lowvram_chat.errors import DoesNotFit, ModelError
from lowvram_chat.gpus import CONTEXT_MIB, GPUS
from lowvram_chat.planning.changes import apply_change, as_overrides
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.search import advise, planned_micro_batch, too_large
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.planner import PLANNER
from lowvram_chat.training.halving import micro_batch_overrides
from lowvram_chat.units import MIB, format_mib

log = logging.getLogger(__name__)

USABLE_SHARE = {"win32": 0.95}
"""Share of a card without a row in the GPU table that this process may use; 0.97 on other systems."""


def plan_within_budget(recipe: Recipe, device: torch.device, *, force: bool) -> tuple[Recipe, Plan | None]:
    """Return the recipe with its micro-batch decided, and the run's plan; on CUDA, cap the process to the budget.

    On a CPU a run is planned only if its recipe has a memory section or asks for a planned micro-batch, since it would be
    refused for a card that it never uses. On Windows a process without a cap would spill into host memory and run tens of
    times slower instead of failing.

    Raises:
        DoesNotFit: the run is predicted not to fit; the message lists changes that make it fit. `force` starts it anyway.
        ModelError: the model cannot be planned. `force` starts the run without a plan.
    """
    if device.type != "cuda" and not recipe.memory.model_fields_set and recipe.train.micro_batch == "given":
        return recipe, None
    recipe = with_planned_micro_batch(recipe, device)
    limited = _with_limit(recipe, device)
    try:
        plan = PLANNER.plan(limited)
    except ModelError as error:
        if not force:
            raise
        log.warning("not planned: %s", error)
        cap_process_memory(recipe, device)
        return recipe, None
    log.info("predicted: %s", plan.verdict.replace("\n", "\n           "))
    if not plan.fits and not force:
        raise DoesNotFit(_refusal(limited, plan))
    _set_memory_cap(plan.limit_bytes, device)
    return recipe, plan


def with_planned_micro_batch(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with `train.micro_batch: planned` decided for this device; other recipes are unchanged."""
    if recipe.train.micro_batch == "given":
        return recipe
    recipe = apply_change(recipe, planned_micro_batch(_with_limit(recipe, device), PLANNER.plan))
    checkpointed = ", with gradient checkpointing" if recipe.train.gradient_checkpointing else ""
    log.info("planned: %s%s", micro_batch_overrides(recipe), checkpointed)
    return recipe


def cap_process_memory(recipe: Recipe, device: torch.device) -> None:
    """Cap the process to the recipe's budget on CUDA, whether the run was planned or not."""
    if device.type == "cuda":
        _set_memory_cap(MIB * (_with_limit(recipe, device).memory.limit_mib or 0), device)


def allocator_limit(plan: Plan | None) -> int | None:
    """Return the bytes that CUDA's allocator may reserve by the plan; None if there is no cap."""
    return plan.limit_bytes - CONTEXT_MIB * MIB if plan is not None and torch.cuda.is_available() else None


def compare_with_plan(plan: Plan | None) -> dict[str, dict[str, float | None]]:
    """Return the predicted and the measured peak for `result.json`; the peak is measured only on CUDA."""
    if plan is None:
        return {}
    predicted = plan.peak_reserved_bytes
    figures: dict[str, float | None] = {
        "predicted_reserved_bytes": predicted,
        "predicted_allocated_bytes": plan.peak_allocated_bytes,
        "measured_reserved_bytes": None,
        "error_percent": None,
    }
    if torch.cuda.is_available():
        measured = torch.cuda.max_memory_reserved()
        error = round(100 * (predicted - measured) / measured, 2)
        log.info(
            "peak reserved: %s MiB predicted, %s MiB measured (%+.1f %%)",
            format_mib(predicted),
            format_mib(measured),
            error,
        )
        figures |= {"measured_reserved_bytes": measured, "error_percent": error}
    return {"memory_plan": figures}


def _set_memory_cap(limit_bytes: int, device: torch.device) -> None:
    """Let the allocator reserve what the limit leaves beside the CUDA context."""
    if device.type == "cuda":
        allowed = max(limit_bytes - CONTEXT_MIB * MIB, 0)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def _with_limit(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with `memory.limit_mib` set for this card: the recipe's own limit, its named card's, or the card's.

    On a CPU the recipe is unchanged: it is planned for the card that it names.
    """
    if device.type != "cuda":
        return recipe
    memory, total_mib = recipe.memory, torch.cuda.get_device_properties(device).total_memory // MIB
    usable = int(total_mib * USABLE_SHARE.get(sys.platform, 0.97))
    named = GPUS[memory.gpu].usable_windows_mib if sys.platform == "win32" else GPUS[memory.gpu].usable_linux_mib
    wanted = memory.limit_mib or (named if "gpu" in memory.model_fields_set else usable)
    if wanted > usable:
        log.info("this card has %d MiB: planning for %d MiB instead of %d MiB", total_mib, usable, wanted)
    return recipe.model_copy(update={"memory": memory.model_copy(update={"limit_mib": min(wanted, usable)})})


def _refusal(recipe: Recipe, plan: Plan) -> str:
    """Return why a run is refused and what would make it fit."""
    suggestions = advise(recipe, PLANNER)
    if not suggestions:
        return f"{too_large(recipe, plan)} --force starts the run anyway."
    changes = "\n".join(
        f"  {as_overrides(suggestion.change)}\n"
        f"      {format_mib(suggestion.plan.on_card_bytes)} MiB, a step takes about {suggestion.cost:+.0%} time"
        for suggestion in suggestions
    )
    return f"{plan.verdict}\nAdd one of these changes, or --force to start anyway:\n{changes}"
