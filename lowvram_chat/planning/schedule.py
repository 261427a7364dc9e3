"""Longer runs out of one trace: its optimizer steps, each traced once, played in any order.

What the allocator keeps and cuts depends on the order of sizes, and a batch shorter than the rest can raise the reserved
peak. Tracing takes seconds and replaying milliseconds; so each length is traced once, and the steps are shuffled after.
A step hands a few storages to the next one (its batch, its loss): those are matched by their order of birth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lowvram_chat.tracing.recorder import Event, Span, Storage


class Segment:
    """A part of a trace that can be played again and again, since what it makes dies in it or is handed on.

    What is born in it and never dies is there for good (a workspace, the optimizer's states) and not played anew; but
    where the part is `steady`, one of many alike, it is handed on too: only the trace's end kept it from its death.
    """

    def __init__(self, events: Sequence[Event], span: Span, lifetimes: Lifetimes, *, steady: bool = False) -> None:
        start, end = span
        self.events = [event for event in events[start:end] if steady or event.storage in lifetimes.freed_at]
        never = len(events)
        self.left = [
            e.storage for e in self.events if e.is_allocation and lifetimes.freed_at.get(e.storage, never) >= end
        ]
        """What is born here and dies later, in order."""
        before = [e.storage for e in self.events if not e.is_allocation and lifetimes.allocated_at[e.storage] < start]
        self.taken = sorted(before, key=lifetimes.allocated_at.__getitem__)
        """What was born before and dies here, in order of birth."""
        shared = {*self.left, *self.taken}
        self.places = [index for index, event in enumerate(self.events) if event.storage in shared]
        """Where the two stand: all other storages can be played as they are, for they are dead at the end."""


class Lifetimes:
    """The indices of each storage's birth and death; one that never dies has no death."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.allocated_at = {storage: index for index, (storage, is_allocation) in enumerate(events) if is_allocation}
        self.freed_at = {storage: index for index, (storage, is_allocation) in enumerate(events) if not is_allocation}


def compose_run(before: Sequence[Event], handed_on: Sequence[Storage], segments: Iterable[Segment]) -> list[Event]:
    """Returns the events of a run: what stood before, which left `handed_on`, then the segments.

    The segments must hand on alike: all optimizer steps of one recipe do, and an evaluation hands on nothing.
    """
    played = list(before)
    for segment in segments:
        new = dict(zip(segment.taken, handed_on, strict=True)) if segment.taken else {}
        new |= {storage: replace(storage) for storage in segment.left}
        start = len(played)
        played += segment.events
        for place in segment.places:
            storage, is_allocation = segment.events[place]
            played[start + place] = Event(new[storage], is_allocation)
        if segment.taken or segment.left:
            handed_on = [new[storage] for storage in segment.left]
    return played
