"""Plans on the terminal: tables of memory and lines of predicted speed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from lowvram_chat.planning.changes import apply_change, as_overrides
from lowvram_chat.planning.plan import SYSTEM_TITLES, Plan
from lowvram_chat.planning.search import Suggestion
from lowvram_chat.recipe.card import card_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.speed import Speed, predict_speed, speeds_by_power_limit
from lowvram_chat.timing.whole_run import steps_of
from lowvram_chat.units import MIB, count, format_duration, format_mib

PEAK_PHASES = {
    "load": "while the model is loaded",
    "checks": "in the checks before the first step",
    "evaluation": "during evaluation",
    "forward": "in the forward pass",
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "clipping": "while the gradients are clipped",
    "optimizer": "in the optimizer step",
    "saving": "while a checkpoint is saved",
}
"""Phase of a plan -> when the peak comes."""


def show_plan(recipe: Recipe, plan: Plan) -> None:
    """Print a plan on stdout."""
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(_categories_table(plan))
    console.print(_largest_table(plan))
    fragmentation = plan.peak_reserved_bytes - plan.longest_reserved_bytes
    print(
        f"peak: {format_mib(plan.peak_allocated_bytes)} MiB allocated, {format_mib(plan.peak_reserved_bytes)} MiB reserved"
        + (f" ({format_mib(fragmentation)} MiB of it is fragmentation)" if fragmentation > 0 else "")
        + f", {format_mib(plan.on_card_bytes)} MiB on the card; the peak comes {PEAK_PHASES[plan.phase]}"
    )
    print(plan.verdict)
    print(speed_lines(recipe, plan))


def speed_lines(recipe: Recipe, plan: Plan) -> str:
    """Return the predicted speed at each power limit of the card."""
    card = card_of(recipe.memory)
    if not card.fp16_tflops:
        return (
            f"no speed is predicted for {card.title}, whose rates are not known: lowvram-chat doctor --selftest measures them, "
            "and memory.card takes them"
        )
    lines = [
        f"predicted speed on {card.title}, for rows of data.max_length tokens, and the range that held nine in ten published "
        "speeds:"
    ]
    steps = steps_of(recipe)
    return "\n".join([*lines, *(_speed_line(speed, steps) for speed in speeds_by_power_limit(recipe, plan.work))])


def _speed_line(speed: Speed, steps: int | None) -> str:
    """Return a predicted speed, with the time of the whole run if its steps are known."""
    run = (
        ""
        if steps is None
        else f"; the run's {count(steps, 'step')}: {format_duration(steps * speed.seconds_per_step)}"
    )
    watts = f"{speed.watts} W: " if speed.watts else ""
    lowest, highest = speed.range_of_tokens_per_second
    return (
        f"  {watts}{speed.tokens_per_second:,.0f} tokens/s ({lowest:,.0f} to {highest:,.0f}), "
        f"{1000 * speed.seconds_per_step:,.0f} ms per step, "
        f"{speed.utilisation:.0%} of the peak rate{run}"
    )


def show_advice(suggestions: Sequence[Suggestion]) -> None:
    """Print changes that make a recipe fit."""
    print("\nany of these changes makes it fit (memory and speed are predicted):")
    for suggestion in suggestions:
        print(f"  {as_overrides(suggestion.change)}")
        print(f"      {format_mib(suggestion.plan.on_card_bytes)} MiB, {_cost(suggestion.cost)}")


def show_fastest(recipe: Recipe, suggestions: Sequence[Suggestion]) -> None:
    """Print the settings that fit as a table, then as overrides to paste."""
    table = Table("", "MiB", "spare", "speed, predicted", "batch", "checkpointing", "optimizer")
    for number, suggestion in enumerate(suggestions, start=1):
        changed = apply_change(recipe, suggestion.change)
        table.add_row(
            str(number),
            format_mib(suggestion.plan.on_card_bytes),
            format_mib(suggestion.plan.spare_bytes),
            _cost(suggestion.cost),
            f"{changed.train.per_device_train_batch_size} x {changed.train.gradient_accumulation_steps}",
            "yes" if changed.train.gradient_checkpointing else "no",
            changed.optimizer.name,
        )
    Console(markup=False, emoji=False, highlight=False).print(table)
    for number, suggestion in enumerate(suggestions, start=1):
        print(f"{number}: {as_overrides(suggestion.change) or 'the recipe as it is'}")


def show_side_by_side(names: Sequence[str], recipes: Sequence[Recipe], plans: Sequence[Plan]) -> None:
    """Print two plans, category by category, and their predicted speeds."""
    table = Table("MiB", *(Column(name, overflow="fold") for name in names), "difference")
    for category in plans[0].categories:
        sizes = [plan.categories.get(category, 0) for plan in plans]
        table.add_row(category, *map(format_mib, sizes), _signed_mib(sizes[1] - sizes[0]))
    totals = [plan.on_card_bytes for plan in plans]
    table.add_section()
    table.add_row("on the card", *map(format_mib, totals), _signed_mib(totals[1] - totals[0]))
    for system in (system for system in plans[0].limits if system in plans[1].limits):
        table.add_row(
            f"fits, {SYSTEM_TITLES[system]}", *("yes" if plan.fits_on[system] else "no" for plan in plans), ""
        )
    if all(card_of(recipe.memory).fp16_tflops for recipe in recipes):
        pairs = zip(recipes, plans, strict=True)
        rates = [predict_speed(recipe, plan.work).tokens_per_second for recipe, plan in pairs]
        table.add_row("tokens/s, predicted", *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0] - 1:+.0%}")
    Console(markup=False, emoji=False, highlight=False, soft_wrap=True).print(table)


def _categories_table(plan: Plan) -> Table:
    table = Table("at the peak", "MiB", "share")
    for category, nbytes in sorted(plan.categories.items(), key=lambda item: -item[1]):
        table.add_row(category, format_mib(nbytes), f"{nbytes / plan.on_card_bytes:.0%}")
    return table


def _largest_table(plan: Plan) -> Table:
    table = Table("largest tensors", "tensors", "MiB", "allocated by")
    for tensor in plan.largest:
        table.add_row(tensor.category, str(tensor.count), format_mib(tensor.nbytes), tensor.origin)
    return table


def _cost(cost: float) -> str:
    return "about as fast" if abs(cost) < 0.01 else f"about {abs(cost):.0%} {'slower' if cost > 0 else 'faster'}"


def _signed_mib(nbytes: float) -> str:
    return f"{nbytes / MIB:+,.0f}"
