"""Plans as JSON documents: what `plan --json` prints."""

from __future__ import annotations

from lowvram_chat.planning.changes import as_overrides
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.search import Suggestion
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results.baseline import seconds_per_epoch
from lowvram_chat.timing.speed import Speed, speeds_by_power_limit
from lowvram_chat.timing.whole_run import steps_of


def plan_document(recipe: Recipe, plan: Plan) -> dict[str, object]:
    """Return a plan as JSON; sizes are in bytes."""
    return {
        "fits": plan.fits,
        "fits_on": dict(plan.fits_on),
        "limit_bytes": dict(plan.limits),
        "peak_allocated_bytes": plan.peak_allocated_bytes,
        "peak_reserved_bytes": plan.peak_reserved_bytes,
        "longest_reserved_bytes": plan.longest_reserved_bytes,
        "on_card_bytes": plan.on_card_bytes,
        "spare_bytes": plan.spare_bytes,
        "moment": plan.phase,  # the key of version 0.1.0, which programs read
        "categories": dict(plan.categories),
        "largest": [
            {"bytes": t.nbytes, "count": t.count, "category": t.category, "origin": t.origin} for t in plan.largest
        ],
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "steps": steps_of(recipe),
        "predicted_speed": [_speed_document(speed) for speed in speeds_by_power_limit(recipe, plan.work)],
    }


def suggestion_document(suggestion: Suggestion) -> dict[str, object]:
    """Return a suggestion as JSON."""
    return {
        "change": dict(suggestion.change),
        "words": as_overrides(suggestion.change),
        "on_card_bytes": suggestion.plan.on_card_bytes,
        "spare_bytes": suggestion.plan.spare_bytes,
        "predicted_cost": round(suggestion.cost, 3),
    }


def _speed_document(speed: Speed) -> dict[str, object]:
    epoch = seconds_per_epoch(speed.tokens_per_second)
    return {
        "gpu": speed.gpu,
        "watts": speed.watts,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "tokens_per_second_range": [round(rate, 1) for rate in speed.range_of_tokens_per_second],
        "seconds_per_step": round(speed.seconds_per_step, 5),
        "utilisation": round(speed.utilisation, 4),
        "seconds_per_baseline_epoch": round(epoch, 1),
        "seconds_per_three_baseline_epochs": round(3 * epoch, 1),
        "physical_limit_seconds_per_three_baseline_epochs": round(3 * epoch * speed.utilisation, 1),
        "flops_per_step": speed.flops_per_step,
        "launches_per_step": speed.launches_per_step,
    }
