"""What would make a recipe fit, cheapest first; and the fastest settings that fit.

Every answer is planned like the recipe itself, and its speed is predicted from the same trace. Of the ways to cut a step into
micro-batches the largest that fits is taken, found by halving: a micro-batch needs no more memory than a larger one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowvram_chat.planning.changes import Change, apply_change, free_savings, lighter_optimizers, micro_batch_changes
from lowvram_chat.planning.plan import Plan, make_plan
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.speed import predict_speed
from lowvram_chat.units import MIB

MAX_MICRO_BATCH_ROWS = 1024
"""Of a micro-batch, that are looked at."""
SAFETY_MARGIN_BYTES = 50 * MIB
"""What a proposal leaves free: the size of a CUDA context is known no better."""
BATCH_INDEPENDENT_CATEGORIES = ("weights", "optimizer state", "gradients", "cuBLAS", "context")
"""Categories that no smaller micro-batch makes smaller."""
MIN_ROW_TOKENS = 32
"""Tokens of a row that a chat can still be learned from."""
MAX_SUGGESTIONS = 4
"""Changes that an advice names."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings that fit."""

    change: Change
    """What to set, beside what the recipe says."""
    plan: Plan
    cost: float
    """How much longer the same tokens take than with the recipe's own settings: 0.33 is a third; negative is faster."""


def advise(recipe: Recipe) -> list[Suggestion]:
    """Returns changes that make the recipe fit, the cheapest in speed first; empty where none does.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    found = _first_fitting(recipe, _candidates(recipe)) or _first_fitting(recipe, _minimal_candidates(recipe))
    useful = (one for one in found if not any(_dominates(other, one) for other in found))
    return sorted(useful, key=lambda option: option.cost)


def _first_fitting(recipe: Recipe, ladders: Iterable[Iterable[Change]]) -> list[Suggestion]:
    """Returns the first change of each ladder that fits, and that is not an earlier one with more added."""
    found: list[Suggestion] = []
    for ladder in ladders:
        enough = [option.change.items() for option in found]
        # An adapter is a change of its own, worth more than what it is added to.
        new = (c for c in ladder if "adapter.kind" in c or not any(part <= c.items() for part in enough))
        options = (_suggestion(recipe, change) for change in new if not _cannot_fit(recipe, change))
        found += itertools.islice((option for option in options if option is not None), 1)
        if len(found) == MAX_SUGGESTIONS:
            break
    return found


def _dominates(other: Suggestion, one: Suggestion) -> bool:
    """Whether the other option changes fewer settings and is as fast."""
    return other.change.keys() < one.change.keys() and other.cost <= one.cost


def fastest(recipe: Recipe) -> list[Suggestion]:
    """Returns the settings that fit, the fastest first: same rows a step, same length, same function.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    free = free_savings(recipe)
    found = []
    for optimizer in [{}, *lighter_optimizers(recipe)]:
        for checkpointing in (False, True):
            change = {**free, **optimizer, **_checkpointing_change(recipe, checkpointing)}
            option = _largest_micro_batch(recipe, change)
            if option is not None:
                found.append(option)
    return sorted(found, key=lambda option: (option.cost, option.plan.on_card_bytes))


def planned_micro_batch(recipe: Recipe) -> Change:
    """Returns what `train.micro_batch: planned` comes to on the recipe's card; nothing where it is given.

    Where nothing fits it is the least that a step can be, which is then refused with advice like any recipe.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    if recipe.train.micro_batch == "given":
        return {}
    given = {"train.micro_batch": "given"}
    for checkpointing in (False, True):
        change = {**given, **_checkpointing_change(recipe, checkpointing)}
        cut = _largest_cut(recipe, change)
        if cut is not None:
            return {**change, **cut}
    return {**change, **list(micro_batch_changes(recipe))[-1]}


def largest_micro_batch(recipe: Recipe, system: str) -> int:
    """Returns the most rows of a micro-batch that fit on "linux" or "windows"; 0 where not even one does.

    What a row adds is nearly the same for every row, so a straight line through two plans leads to the next guess.
    """
    fits, fails, rows = 0, MAX_MICRO_BATCH_ROWS + 1, max(1, recipe.train.per_device_train_batch_size)
    peaks: dict[int, int] = {}
    while fails - fits > 1:
        planned = make_plan(apply_change(recipe, {"train.per_device_train_batch_size": rows}))
        peaks[rows] = planned.on_card_bytes
        fits, fails = (rows, fails) if planned.fits_on[system] else (fits, rows)
        rows = min(max(_interpolated_rows(peaks, planned.limits[system], rows), fits + 1), fails - 1)
    return fits


def _interpolated_rows(peaks: Mapping[int, int], limit: int, rows: int) -> int:
    """The rows at which a line through the two known peaks that are nearest to the limit meets it."""
    if len(peaks) == 1:
        return 2 * rows if peaks[rows] < limit else rows // 2
    one, other = sorted(peaks, key=lambda known: abs(peaks[known] - limit))[:2]
    a_row = (peaks[other] - peaks[one]) / (other - one)
    return round(one + (limit - peaks[one]) / a_row) if a_row > 0 else (one + other) // 2


def _candidates(recipe: Recipe) -> Iterator[Iterable[Change]]:
    """Yields what to try, roughly from cheap to dear; of each ladder, the first rung that fits is taken."""
    free, halves = free_savings(recipe), list(_smaller_micro_batches(recipe))
    optimizers, checkpointing = lighter_optimizers(recipe), _checkpointing_change(recipe, True)
    if make_plan(recipe).phase == "evaluation":
        yield [{"train.per_device_eval_batch_size": recipe.train.per_device_train_batch_size}]
    if free:
        yield [free]
    yield optimizers
    yield halves
    yield [{**free, **optimizer, **half} for half in halves for optimizer in optimizers]
    if checkpointing:
        yield [checkpointing]
        yield [{**free, **half, **checkpointing} for half in halves]
        yield [{**free, **optimizer, **half, **checkpointing} for half in halves for optimizer in optimizers]
    lora = {**free, "adapter.kind": "lora"} if recipe.adapter is None else free
    smaller = [{}, *halves, *({**half, **checkpointing} for half in halves)]
    if recipe.adapter is None:
        yield [{**lora, **less} for less in smaller]
    if recipe.model.load_in is None:
        yield [{**lora, "model.dtype": "float16", "model.load_in": "4bit", **less} for less in smaller]


def _minimal_candidates(recipe: Recipe) -> Iterator[Iterable[Change]]:
    """Yields the least that a step can be, then shorter rows, which change what is learned; in LoRA too."""
    rows = recipe.train.effective_batch_size
    least: dict[str, Any] = {
        **free_savings(recipe),
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": rows,
        "train.per_device_eval_batch_size": 1,
        **_checkpointing_change(recipe, True),
    }
    lengths = [recipe.data.max_length >> shift for shift in range(1, 4)]
    rungs = [least, *({**least, "data.max_length": length} for length in lengths if length >= MIN_ROW_TOKENS)]
    yield rungs
    if recipe.adapter is None:
        yield [{**rung, "adapter.kind": "lora"} for rung in rungs]


def _cannot_fit(recipe: Recipe, change: Change) -> bool:
    """Whether a change cannot be enough: what must stay on the card is already too much, so no trace is needed."""
    own = make_plan(recipe)
    keep = {name: own.categories[name] for name in BATCH_INDEPENDENT_CATEGORIES}
    if "model.load_in" in change:
        keep["weights"] //= 8
    if "adapter.kind" in change:
        keep |= {"gradients": 0, "optimizer state": 0}
    if "optimizer.name" in change:
        keep["optimizer state"] = 0
    share = change.get("train.per_device_train_batch_size", recipe.train.per_device_train_batch_size)
    share /= recipe.train.per_device_train_batch_size
    lighter = {"train.gradient_checkpointing", "model.fused_gelu", "data.max_length"} & change.keys()
    activations = 0 if lighter else share
    return sum(keep.values()) + activations * own.categories["activations"] + SAFETY_MARGIN_BYTES > own.limit_bytes


def _smaller_micro_batches(recipe: Recipe) -> Iterable[Change]:
    """The micro-batches below the recipe's own: half of it, a quarter, ... and one row."""
    own = recipe.train.per_device_train_batch_size
    sizes = {own >> shift for shift in range(1, own.bit_length())}
    return [change for change in micro_batch_changes(recipe) if change["train.per_device_train_batch_size"] in sizes]


def _largest_micro_batch(recipe: Recipe, change: Change) -> Suggestion | None:
    cut = _largest_cut(recipe, change)
    return None if cut is None else _suggestion(recipe, {**change, **cut})


def _largest_cut(recipe: Recipe, change: Change) -> Change | None:
    """The optimizer step in the fewest micro-batches that fit, beside a change; None where not even single rows fit."""
    cuts = list(micro_batch_changes(recipe))
    first, last = 0, len(cuts)
    while first < last:
        middle = (first + last) // 2
        if _fits_well(make_plan(apply_change(recipe, {**change, **cuts[middle]}))):
            last = middle
        else:
            first = middle + 1
    return cuts[first] if first < len(cuts) else None


def _checkpointing_change(recipe: Recipe, wanted: bool) -> dict[str, Any]:
    return {} if recipe.train.gradient_checkpointing == wanted else {"train.gradient_checkpointing": wanted}


def _fits_well(planned: Plan) -> bool:
    return planned.fits and planned.spare_bytes >= SAFETY_MARGIN_BYTES


def _suggestion(recipe: Recipe, change: Change) -> Suggestion | None:
    """The change as an option, where it fits."""
    own, new = make_plan(recipe), apply_change(recipe, change)
    planned = make_plan(new)
    if not _fits_well(planned):
        return None
    before, after = predict_speed(recipe, own.work), predict_speed(new, planned.work)
    return Suggestion(change=change, plan=planned, cost=before.tokens_per_second / after.tokens_per_second - 1)
