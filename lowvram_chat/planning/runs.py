"""The runs that a plan considers: rows of the maximum length, a resumed run, and shuffled row lengths.

What the allocator caches depends on the order of sizes, so a batch that is shorter than the rest can raise the reserved
peak. Each length is traced once; the runs are composed from those steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from lowvram_chat.planning.schedule import Lifetimes, Segment, compose_run
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing.recorder import Event
from lowvram_chat.tracing.run import RunTrace
from lowvram_chat.tracing.training_loop import MicroBatchShape

SHUFFLED_RUNS, STEPS_PER_SHUFFLED_RUN = 3, 12
"""Orders of row lengths that are tried, and optimizer steps in each. Trying 16 orders raised the peak of no shipped recipe
by more than 2 MiB."""


def traced_steps(recipe: Recipe) -> list[list[MicroBatchShape]]:
    """Return the optimizer steps to trace, as their micro-batches: two with rows of the maximum length, the rest shorter.

    Two accumulated micro-batches stand for any number: the second one already accumulates into gradients.
    """
    longest, packed = recipe.data.max_length, recipe.data.rows == "packed"

    def shape(share: float, labelled: float = 1.0) -> MicroBatchShape:
        if packed:  # packed rows all have the maximum length
            return MicroBatchShape(longest, labelled * share, packed)
        return MicroBatchShape(max(2, int(share * longest)), labelled, packed)

    if recipe.train.gradient_accumulation_steps == 1:
        return [[shape(1)], [shape(1)], [shape(0.6, 0.7)], [shape(0.3)]]
    return [[shape(1), shape(1)], [shape(1), shape(1)], [shape(1), shape(0.6, 0.7)], [shape(0.3), shape(0.8, 0.4)]]


def composed_runs(traced: RunTrace) -> Iterator[list[Event]]:
    """Yield the events of each run; the first has rows of the maximum length only, the second is resumed.

    The others have shuffled row lengths, with an evaluation halfway and at the end.
    """
    lifetimes = Lifetimes(traced.events)
    start = traced.events[: traced.steps[0][1]]
    handed_on = Segment(traced.events, (0, len(start)), lifetimes).outgoing
    longest, *shorter = (Segment(traced.events, span, lifetimes, steady=True) for span in traced.steps[1:])
    evaluation = [Segment(traced.events, traced.evaluation, lifetimes)] if traced.evaluation else []
    yield compose_run(start, handed_on, [longest, *evaluation, longest, *evaluation])
    yield compose_run(_resumed(start, traced.steps[0][0]), handed_on, [longest, *evaluation])
    for seed in range(SHUFFLED_RUNS):
        order = random.Random(seed).choices([longest, *shorter], k=STEPS_PER_SHUFFLED_RUN)
        half = STEPS_PER_SHUFFLED_RUN // 2
        segments = [longest, *order[:half], *evaluation, *order[half:], longest, *evaluation]
        yield compose_run(start, handed_on, segments)


def _resumed(start: Sequence[Event], first_step: int) -> list[Event]:
    """Return the start of a run in which a checkpoint fills the optimizer's states before the first step.

    Source: transformers/trainer.py, `_load_optimizer_and_scheduler`: read on the host, then moved to the weights' device.
    """
    states: list[Event] = []
    others: list[Event] = []
    for event in start[first_step:]:
        (states if event.storage.category == "optimizer state" else others).append(event)
    return [*start[:first_step], *states, *others]
