"""Changes that make a recipe fit, cheapest first, and the fastest settings that fit.

Every candidate is planned like the recipe itself, and its speed is predicted from the same trace. How a recipe is planned
is handed in as a `Planner`, so that the search knows neither the trace nor the time model. A smaller micro-batch never
needs more memory than a larger one, so the largest one that fits is found by bisection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lowvram_chat.planning.changes import Change, apply_change, free_savings, lighter_optimizers, micro_batch_changes
from lowvram_chat.planning.plan import LIMIT_SETTING, Plan
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.units import MIB, format_mib

MAX_MICRO_BATCH_ROWS = 1024
"""Largest micro-batch that is tried."""
SAFETY_MARGIN_BYTES = 50 * MIB
"""Memory that a suggestion leaves free, because the size of a CUDA context is not known more precisely."""
BATCH_INDEPENDENT_CATEGORIES = ("weights", "optimizer state", "gradients", "cuBLAS", "context")
"""Categories that a smaller micro-batch does not shrink."""
MIN_ROW_TOKENS = 32
"""Shortest rows that are suggested: fewer tokens hold no exchange to learn from."""
MAX_SUGGESTIONS = 4


@dataclass(frozen=True, kw_only=True)
class Planner:
    """How the search plans a recipe and predicts its speed."""

    plan: Callable[[Recipe], Plan]
    tokens_per_second: Callable[[Recipe, Plan], float]
    """Predicted speed of a recipe, given its plan."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change to a recipe whose result fits."""

    change: Change
    """Settings to change."""
    plan: Plan
    cost: float
    """Extra time for the same tokens compared with the recipe as it is: 0.33 is a third slower, a negative value faster."""


def advise(recipe: Recipe, planner: Planner) -> list[Suggestion]:
    """Return changes that make the recipe fit, fastest first; empty if there are none.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be loaded.
    """
    found = _first_fitting(recipe, planner, _candidates(recipe, planner)) or _first_fitting(
        recipe, planner, _minimal_candidates(recipe)
    )
    useful = (suggestion for suggestion in found if not any(_dominates(other, suggestion) for other in found))
    return sorted(useful, key=lambda suggestion: suggestion.cost)


def fastest(recipe: Recipe, planner: Planner) -> list[Suggestion]:
    """Return settings that fit, fastest first, with the recipe's effective batch size, row length and loss.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be loaded.
    """
    found = []
    for optimizer in [{}, *lighter_optimizers(recipe)]:
        for checkpointing in (False, True):
            change = {**free_savings(recipe), **optimizer, **_checkpointing_change(recipe, checkpointing)}
            cut = _largest_cut(recipe, planner.plan, change)
            suggestion = None if cut is None else _suggestion(recipe, planner, {**change, **cut})
            if suggestion is not None:
                found.append(suggestion)
    return sorted(found, key=lambda suggestion: (suggestion.cost, suggestion.plan.on_card_bytes))


def planned_micro_batch(recipe: Recipe, plan: Callable[[Recipe], Plan]) -> Change:
    """Return the change that `train.micro_batch: planned` stands for; empty where the micro-batch is given.

    If nothing fits, it is the smallest possible step, which is then refused with advice like any other recipe.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be loaded.
    """
    if recipe.train.micro_batch == "given":
        return {}
    for checkpointing in (False, True):
        change = {"train.micro_batch": "given", **_checkpointing_change(recipe, checkpointing)}
        cut = _largest_cut(recipe, plan, change)
        if cut is not None:
            return {**change, **cut}
    return {**change, **list(micro_batch_changes(recipe))[-1]}


def largest_micro_batch(recipe: Recipe, system: str, plan: Callable[[Recipe], Plan]) -> int:
    """Return the rows of the largest micro-batch that fits on "linux" or "windows"; 0 if not even one row fits.

    Each row adds nearly the same memory, so a line through two plans gives the next guess.
    """
    fits, fails, rows = 0, MAX_MICRO_BATCH_ROWS + 1, max(1, recipe.train.per_device_train_batch_size)
    peaks: dict[int, int] = {}
    while fails - fits > 1:
        planned = plan(apply_change(recipe, {"train.per_device_train_batch_size": rows}))
        peaks[rows] = planned.on_card_bytes_on(system)
        fits, fails = (rows, fails) if planned.fits_on[system] else (fits, rows)
        rows = min(max(_interpolated_rows(peaks, planned.limits[system], rows), fits + 1), fails - 1)
    return fits


def too_large(recipe: Recipe, plan: Plan) -> str:
    """Return the message for a model that does not fit with any settings."""
    remedy = "raise memory.limit_mib" if plan.budget == LIMIT_SETTING else "plan for a larger card with memory.gpu"
    return (
        f"model.name: {recipe.model.name} does not fit in {format_mib(plan.limit_bytes)} MiB with any settings, not even "
        f"with LoRA and one short row at a time (its weights take {format_mib(plan.categories['weights'])} MiB, the CUDA "
        f"context {format_mib(plan.context_bytes)} MiB). Use a smaller model, or {remedy}."
    )


def _interpolated_rows(peaks: Mapping[int, int], limit: int, rows: int) -> int:
    """Return where a line through the two known peaks nearest to the limit reaches it."""
    if len(peaks) == 1:
        return 2 * rows if peaks[rows] < limit else rows // 2
    nearest, second = sorted(peaks, key=lambda known: abs(peaks[known] - limit))[:2]
    bytes_per_row = (peaks[second] - peaks[nearest]) / (second - nearest)
    if bytes_per_row <= 0:
        return (nearest + second) // 2
    return round(nearest + (limit - peaks[nearest]) / bytes_per_row)


def _first_fitting(recipe: Recipe, planner: Planner, groups: Iterable[Iterable[Change]]) -> list[Suggestion]:
    """Return the first change of each group that fits, unless it only adds to a change found earlier."""
    found: list[Suggestion] = []
    for group in groups:
        earlier = [suggestion.change.items() for suggestion in found]
        # An adapter is worth suggesting even on top of a smaller change that fits.
        new = (c for c in group if "adapter.kind" in c or not any(part <= c.items() for part in earlier))
        tried = (_suggestion(recipe, planner, c) for c in new if not _cannot_fit(recipe, planner, c))
        found += itertools.islice((suggestion for suggestion in tried if suggestion is not None), 1)
        if len(found) == MAX_SUGGESTIONS:
            break
    return found


def _dominates(other: Suggestion, suggestion: Suggestion) -> bool:
    """Return whether the other suggestion changes fewer settings and is at least as fast."""
    return other.change.keys() < suggestion.change.keys() and other.cost <= suggestion.cost


def _candidates(recipe: Recipe, planner: Planner) -> Iterator[Iterable[Change]]:
    """Yield groups of changes, roughly from cheap to expensive; the first of each group that fits is taken."""
    free, smaller = free_savings(recipe), list(_smaller_micro_batches(recipe))
    optimizers, checkpointing = lighter_optimizers(recipe), _checkpointing_change(recipe, True)
    if planner.plan(recipe).phase == "evaluation":
        yield [{"train.per_device_eval_batch_size": recipe.train.per_device_train_batch_size}]
    if free:
        yield [free]
    yield optimizers
    yield smaller
    yield [{**free, **optimizer, **cut} for cut in smaller for optimizer in optimizers]
    if checkpointing:
        yield [checkpointing]
        yield [{**free, **cut, **checkpointing} for cut in smaller]
        yield [{**free, **optimizer, **cut, **checkpointing} for cut in smaller for optimizer in optimizers]
    lora = {**free, "adapter.kind": "lora"} if recipe.adapter is None else free
    cuts: list[Change] = [{}, *smaller, *({**cut, **checkpointing} for cut in smaller)]
    if recipe.adapter is None:
        yield [{**lora, **cut} for cut in cuts]
    if recipe.model.load_in is None:
        yield [{**lora, "model.dtype": "float16", "model.load_in": "4bit", **cut} for cut in cuts]


def _minimal_candidates(recipe: Recipe) -> Iterator[Iterable[Change]]:
    """Yield the smallest possible step, then shorter rows, which change what is learned; then both with LoRA."""
    minimal: Change = {
        **free_savings(recipe),
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": recipe.train.effective_batch_size,
        "train.per_device_eval_batch_size": 1,
        **_checkpointing_change(recipe, True),
    }
    lengths = [recipe.data.max_length >> shift for shift in range(1, 4)]
    shorter = ({**minimal, "data.max_length": length} for length in lengths if length >= MIN_ROW_TOKENS)
    changes = [minimal, *shorter]
    yield changes
    if recipe.adapter is None:
        yield [{**change, "adapter.kind": "lora"} for change in changes]


def _cannot_fit(recipe: Recipe, planner: Planner, change: Change) -> bool:
    """Return whether a change cannot be enough, without tracing it: what stays on the card is already too large."""
    current = planner.plan(recipe)
    fixed = {name: current.categories[name] for name in BATCH_INDEPENDENT_CATEGORIES}
    if "model.load_in" in change:
        fixed["weights"] //= 8
    if "adapter.kind" in change:
        fixed |= {"gradients": 0, "optimizer state": 0}
    if "optimizer.name" in change:
        fixed["optimizer state"] = 0
    rows = change.get("train.per_device_train_batch_size", recipe.train.per_device_train_batch_size)
    share = int(rows) / recipe.train.per_device_train_batch_size
    shrinks_activations = {"train.gradient_checkpointing", "model.fused_gelu", "data.max_length"} & change.keys()
    activations = 0 if shrinks_activations else share * current.categories["activations"]
    return sum(fixed.values()) + activations + SAFETY_MARGIN_BYTES > current.limit_bytes


def _smaller_micro_batches(recipe: Recipe) -> Iterable[Change]:
    """Return the micro-batches of half the recipe's rows, a quarter, ... down to one row."""
    current = recipe.train.per_device_train_batch_size
    sizes = {current >> shift for shift in range(1, current.bit_length())}
    return [change for change in micro_batch_changes(recipe) if change["train.per_device_train_batch_size"] in sizes]


def _largest_cut(recipe: Recipe, plan: Callable[[Recipe], Plan], change: Change) -> Change | None:
    """Return the fewest micro-batches per step that fit together with a change; None if not even single rows fit."""
    cuts = list(micro_batch_changes(recipe))
    first, last = 0, len(cuts)
    while first < last:
        middle = (first + last) // 2
        if _fits_with_margin(plan(apply_change(recipe, {**change, **cuts[middle]}))):
            last = middle
        else:
            first = middle + 1
    return cuts[first] if first < len(cuts) else None


def _checkpointing_change(recipe: Recipe, wanted: bool) -> Change:
    return {} if recipe.train.gradient_checkpointing == wanted else {"train.gradient_checkpointing": wanted}


def _fits_with_margin(planned: Plan) -> bool:
    return planned.fits and planned.spare_bytes >= SAFETY_MARGIN_BYTES


def _suggestion(recipe: Recipe, planner: Planner, change: Change) -> Suggestion | None:
    """Return the change as a suggestion if it fits."""
    current, changed = planner.plan(recipe), apply_change(recipe, change)
    planned = planner.plan(changed)
    if not _fits_with_margin(planned):
        return None
    before, after = planner.tokens_per_second(recipe, current), planner.tokens_per_second(changed, planned)
    return Suggestion(change=change, plan=planned, cost=before / after - 1)
