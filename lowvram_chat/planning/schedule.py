"""Composes longer runs from one trace: its optimizer steps, each traced once, replayed in any order.

What the allocator keeps and splits depends on the order of sizes, and a batch shorter than the others can raise the
reserved peak. Tracing takes seconds, and replaying takes milliseconds. Each length is therefore traced once, and the steps
are shuffled afterwards. A step hands a few storages to the next one (its batch, its loss). They are matched by the order
in which they were allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lowvram_chat.tracing.recorder import Event, Span, Storage


class Lifetimes:
    """The indices of the events that allocate and free each storage. A storage that is never freed has no free."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.allocated_at = {storage: index for index, (storage, is_allocation) in enumerate(events) if is_allocation}
        self.freed_at = {storage: index for index, (storage, is_allocation) in enumerate(events) if not is_allocation}


class Segment:
    """A part of a trace that can be replayed repeatedly: it frees what it allocates, or hands it on to the next one.

    A storage that is allocated in the segment and never freed belongs to the whole run (a workspace, the optimizer
    states), and is not allocated again. A `steady` segment, one of many alike, hands such a storage on instead, because
    only the end of the trace came before its free.
    """

    def __init__(self, events: Sequence[Event], span: Span, lifetimes: Lifetimes, *, steady: bool = False) -> None:
        allocated_at, freed_at, never = lifetimes.allocated_at, lifetimes.freed_at, len(events)
        start, end = span
        self.events = [event for event in events[start:end] if steady or event.storage in freed_at]
        self.outgoing = [
            storage for storage, is_allocation in self.events if is_allocation and freed_at.get(storage, never) >= end
        ]
        """Storages that are allocated here and freed later, in order of allocation."""
        freed_here = [storage for storage, is_allocation in self.events if not is_allocation]
        self.incoming = sorted(
            (storage for storage in freed_here if allocated_at[storage] < start), key=allocated_at.__getitem__
        )
        """Storages that were allocated before and are freed here, in order of allocation."""
        shared = {*self.outgoing, *self.incoming}
        self.shared_indices = [index for index, event in enumerate(self.events) if event.storage in shared]
        """Indices of the events of these storages. All other events can be replayed as they are, because their storages
        are freed at the end."""


def compose_run(before: Sequence[Event], handed_on: Sequence[Storage], segments: Iterable[Segment]) -> list[Event]:
    """Return the events of a run: those of `before`, which hands on the storages `handed_on`, then those of the segments.

    Each segment must take as many storages as the one before hands on. All optimizer steps of one recipe do, and an
    evaluation hands on nothing.
    """
    run = list(before)
    for segment in segments:
        replacements = dict(zip(segment.incoming, handed_on, strict=True)) if segment.incoming else {}
        replacements |= {storage: replace(storage) for storage in segment.outgoing}
        start = len(run)
        run += segment.events
        for index in segment.shared_indices:
            storage, is_allocation = segment.events[index]
            run[start + index] = Event(replacements[storage], is_allocation)
        if segment.incoming or segment.outgoing:
            handed_on = [replacements[storage] for storage in segment.outgoing]
    return run
