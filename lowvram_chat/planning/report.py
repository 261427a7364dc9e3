"""A plan in words, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lowvram_chat.gpus import GPUS
from lowvram_chat.planning.changes import apply_change, as_overrides
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.search import Suggestion
from lowvram_chat.recipe.baseline import BASELINE_SECONDS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.speed import Speed, predict_speed, speeds_by_power_limit
from lowvram_chat.units import MIB

SPEED_ERROR_PERCENT = 12
"""Largest error of the time model on the published speeds (`published_speeds`; a test holds it)."""

FASTEST_COLUMNS = ("batch", "checkpointing", "optimizer")
SYSTEM_TITLES = {"linux": "Linux", "windows": "Windows"}


def show(recipe: Recipe, plan: Plan) -> None:
    """Prints a plan on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_categories(plan))
    console.print(_largest(plan))
    variation = plan.peak_reserved_bytes - plan.longest_reserved_bytes
    print(
        f"peak: {_mib(plan.peak_allocated_bytes)} MiB allocated, {_mib(plan.peak_reserved_bytes)} reserved"
        + (f" ({_mib(variation)} of it because shorter batches come between)" if variation > 0 else "")
        + f", {_mib(plan.on_card_bytes)} on the card; it stands in the {plan.phase}"
    )
    print(verdict(recipe, plan))
    print(speed_words(recipe, plan))


def speed_words(recipe: Recipe, plan: Plan) -> str:
    """Returns the predicted speed at each power limit of the card, beside the published baseline."""
    card, limit = GPUS[recipe.memory.gpu].title, speeds_by_power_limit(recipe, plan.work)[0]
    lines = [
        f"predicted speed on {card} (full rows; the model meets published speeds within {SPEED_ERROR_PERCENT} %, see plan --speeds):"
    ]
    lines += [
        f"  {speed.watts} W: {speed.tokens_per_second:,.0f} tokens/s, {1000 * speed.seconds_per_step:,.0f} ms a step, "
        f"{speed.utilisation:.0%} of the peak rate; a baseline epoch {_hours(speed.seconds_per_baseline_epoch)}, three "
        f"{_hours(speed.seconds_per_three_baseline_epochs)}"
        for speed in speeds_by_power_limit(recipe, plan.work)
    ]
    least = limit.physical_limit_seconds_per_three_baseline_epochs
    lines.append(
        f"  (three baseline epochs: published {_hours(BASELINE_SECONDS)}; at the peak rate of {limit.watts} W {_hours(least)})"
    )
    return "\n".join(lines)


def verdict(recipe: Recipe, plan: Plan) -> str:
    """Returns the verdict in a sentence for each system."""
    card = GPUS[recipe.memory.gpu].title
    if recipe.memory.limit_mib is not None:
        return f"{_fits(plan, plan.system)} in memory.limit_mib = {_mib(plan.limit_bytes)} MiB: {_spare(plan, plan.system)}"
    return "\n".join(
        f"{_fits(plan, system)} on {card}, {name} ({_mib(plan.limits[system])} MiB usable): {_spare(plan, system)}"
        for system, name in SYSTEM_TITLES.items()
    )


def show_advice(options: Sequence[Suggestion]) -> None:
    """Prints what would make a recipe fit."""
    print("\nwhat makes it fit (MiB and speed as predicted):")
    for option in options:
        print(f"  {as_overrides(option.change)}")
        print(f"      {_mib(option.plan.on_card_bytes)} MiB, {_cost(option.cost)}")


def too_large(recipe: Recipe, plan: Plan) -> str:
    """Returns the message for a model that no change of settings makes fit."""
    return (
        f"model.name: {recipe.model.name} does not fit {_mib(plan.limit_bytes)} MiB at any setting, not even one short row "
        f"at a time with LoRA (its weights take {_mib(plan.categories['weights'])} MiB, the CUDA context "
        f"{_mib(plan.context_bytes)}). Take a smaller model, or set memory.gpu to a larger card."
    )


def show_fastest(recipe: Recipe, options: Sequence[Suggestion]) -> None:
    """Prints the settings that fit as a table, and as words to paste."""
    table = Table("", "MiB", "spare", "speed, predicted", *FASTEST_COLUMNS)
    for number, option in enumerate(options, start=1):
        chosen = apply_change(recipe, option.change)
        table.add_row(
            str(number),
            _mib(option.plan.on_card_bytes),
            _mib(option.plan.spare_bytes),
            _cost(option.cost),
            f"{chosen.train.per_device_train_batch_size} x {chosen.train.gradient_accumulation_steps}",
            "yes" if chosen.train.gradient_checkpointing else "no",
            chosen.optimizer.name,
        )
    Console(highlight=False).print(table)
    for number, option in enumerate(options, start=1):
        print(f"{number}: {as_overrides(option.change)}")


def show_side_by_side(names: Sequence[str], recipes: Sequence[Recipe], plans: Sequence[Plan]) -> None:
    """Prints two plans, category by category, and their predicted speeds."""
    table = Table("MiB", *(Column(name, overflow="fold") for name in names), "difference")
    for category in plans[0].categories:
        sizes = [plan.categories.get(category, 0) for plan in plans]
        table.add_row(category, *map(_mib, sizes), _signed(sizes[1] - sizes[0]))
    totals = [plan.on_card_bytes for plan in plans]
    table.add_section()
    table.add_row("on the card", *map(_mib, totals), _signed(totals[1] - totals[0]))
    for system, name in SYSTEM_TITLES.items():
        table.add_row(f"fits, {name}", *("yes" if plan.fits_on[system] else "no" for plan in plans), "")
    rates = [predict_speed(recipe, plan.work).tokens_per_second for recipe, plan in zip(recipes, plans, strict=True)]
    table.add_row("tokens/s, predicted", *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0] - 1:+.0%}")
    Console(highlight=False, soft_wrap=True).print(table)


def document(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Returns a plan as JSON."""
    return {
        "fits": plan.fits,
        "fits_on": dict(plan.fits_on),
        "limit_bytes": dict(plan.limits),
        "peak_allocated_bytes": plan.peak_allocated_bytes,
        "peak_reserved_bytes": plan.peak_reserved_bytes,
        "longest_reserved_bytes": plan.longest_reserved_bytes,
        "on_card_bytes": plan.on_card_bytes,
        "spare_bytes": plan.spare_bytes,
        "moment": plan.phase,
        "categories": dict(plan.categories),
        "largest": [
            {"bytes": t.nbytes, "count": t.count, "category": t.category, "origin": t.origin} for t in plan.largest
        ],
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "predicted_speed": [_speed_document(speed) for speed in speeds_by_power_limit(recipe, plan.work)],
    }


def _speed_document(speed: Speed) -> dict[str, Any]:
    return {
        "gpu": speed.gpu,
        "watts": speed.watts,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "seconds_per_step": round(speed.seconds_per_step, 5),
        "utilisation": round(speed.utilisation, 4),
        "seconds_per_baseline_epoch": round(speed.seconds_per_baseline_epoch, 1),
        "seconds_per_three_baseline_epochs": round(speed.seconds_per_three_baseline_epochs, 1),
        "physical_limit_seconds_per_three_baseline_epochs": round(
            speed.physical_limit_seconds_per_three_baseline_epochs, 1
        ),
        "flops_per_step": speed.flops_per_step,
        "launches_per_step": speed.launches_per_step,
    }


def option_document(option: Suggestion) -> dict[str, Any]:
    """Returns an option as JSON."""
    return {
        "change": dict(option.change),
        "words": as_overrides(option.change),
        "on_card_bytes": option.plan.on_card_bytes,
        "spare_bytes": option.plan.spare_bytes,
        "predicted_cost": round(option.cost, 3),
    }


def _categories(plan: Plan) -> Table:
    table = Table("at the peak", "MiB", "share")
    for category, nbytes in sorted(plan.categories.items(), key=lambda item: -item[1]):
        table.add_row(category, _mib(nbytes), f"{nbytes / plan.on_card_bytes:.0%}")
    return table


def _largest(plan: Plan) -> Table:
    table = Table("largest tensors", "tensors", "MiB", "made by")
    for tensor in plan.largest:
        table.add_row(tensor.category, str(tensor.count), _mib(tensor.nbytes), tensor.origin)
    return table


def _fits(plan: Plan, system: str) -> str:
    return "fits" if plan.fits_on[system] else "DOES NOT FIT"


def _spare(plan: Plan, system: str) -> str:
    spare = plan.limits[system] - plan.on_card_bytes
    if spare >= 0:
        return f"{_mib(spare)} MiB to spare"
    if plan.fits_on[system]:
        return f"only just: {_mib(-spare)} MiB must be given back and taken anew, which costs time"
    return f"{_mib(-spare)} MiB too much"


def _cost(cost: float) -> str:
    return "about as fast" if abs(cost) < 0.01 else f"about {abs(cost):.0%} {'slower' if cost > 0 else 'faster'}"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.0f}"


def _signed(nbytes: float) -> str:
    return f"{nbytes / MIB:+,.0f}"
