"""The memory budget of a run on its device: planned before the start, enforced on CUDA, compared with the measured peak."""

from __future__ import annotations

import logging

import torch

from lowvram_chat.errors import DoesNotFit, ModelError
from lowvram_chat.gpus import this_system
from lowvram_chat.model.present_card import for_this_run
from lowvram_chat.planning.changes import Change, apply_change, as_overrides
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.search import advise, planned_micro_batch, too_large
from lowvram_chat.recipe.card import card_of, limits_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.planner import PLANNER
from lowvram_chat.training.halving import micro_batch_overrides
from lowvram_chat.units import MIB, format_mib

log = logging.getLogger(__name__)


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
    for_card = for_this_run(recipe, device)
    try:
        change = planned_micro_batch(for_card, PLANNER.plan)
        recipe, for_card = apply_change(recipe, change), apply_change(for_card, change)
        _log_change(recipe, change)
        plan = PLANNER.plan(for_card)
    except ModelError as error:
        if not force:
            raise
        log.warning("not planned: %s", error)
        _set_memory_cap(_allocator_bytes(for_card), device)
        return recipe, None
    log.info("predicted: %s", plan.verdict.replace("\n", "\n           "))
    if not plan.fits and not force:
        raise DoesNotFit(_refusal(for_card, plan))
    _set_memory_cap(plan.limit_bytes - plan.outside_allocator_bytes(plan.system), device)
    return recipe, plan


def with_planned_micro_batch(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with `train.micro_batch: planned` decided for this device; other recipes are unchanged."""
    if recipe.train.micro_batch == "given":
        return recipe
    change = planned_micro_batch(for_this_run(recipe, device), PLANNER.plan)
    recipe = apply_change(recipe, change)
    _log_change(recipe, change)
    return recipe


def _log_change(recipe: Recipe, change: Change) -> None:
    """Log a micro-batch that was decided on."""
    if change:
        checkpointed = ", with gradient checkpointing" if recipe.train.gradient_checkpointing else ""
        log.info("planned: %s%s", micro_batch_overrides(recipe), checkpointed)


def cap_process_memory(recipe: Recipe, device: torch.device) -> None:
    """Cap the process to the recipe's budget on CUDA, whether the run was planned or not."""
    if device.type == "cuda":
        _set_memory_cap(_allocator_bytes(for_this_run(recipe, device)), device)


def allocator_limit(plan: Plan | None) -> int | None:
    """Return the bytes that CUDA's allocator may reserve by the plan; None if there is no cap."""
    if plan is None or not torch.cuda.is_available():
        return None
    return plan.limit_bytes - plan.outside_allocator_bytes(plan.system)


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


def _allocator_bytes(recipe: Recipe) -> int:
    """Return what the limit of a recipe's card leaves to the allocator beside the CUDA context."""
    return limits_of(recipe.memory)[this_system()] - card_of(recipe.memory).context_mib * MIB


def _set_memory_cap(allocator_bytes: int, device: torch.device) -> None:
    """Let the allocator reserve so many bytes and no more."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(allocator_bytes, 0) / total), device)


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
