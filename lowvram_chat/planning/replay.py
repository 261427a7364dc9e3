"""A trace, replayed through the allocator: the peaks, when they stand, and whether the card is large enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowvram_chat.planning import allocator
from lowvram_chat.tracing.recorder import Event, Storage


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a card would have shown, in bytes."""

    peak_allocated_bytes: int
    """`torch.cuda.max_memory_allocated`."""
    peak_reserved_bytes: int
    """`torch.cuda.max_memory_reserved`."""
    peak_at: int
    """Index of the event that took the allocated memory to its peak."""
    out_of_memory_at: Storage | None
    """The storage that found no room; None when the whole trace fitted."""


def replay(events: Iterable[Event], limit_bytes: int | None = None) -> Replay:
    """Returns the peaks of a trace on a card whose allocator may reserve `limit_bytes` (None: no limit)."""
    card = allocator.CachingAllocator(limit_bytes)
    blocks: dict[Storage, allocator.Block] = {}
    failed = None
    peak = peak_at = 0
    for index, (storage, is_allocation) in enumerate(events):
        if not is_allocation:
            card.free(blocks.pop(storage)) if storage.nbytes else None
        elif storage.nbytes:
            block = card.malloc(storage.nbytes)
            if block is None:
                failed = storage
                break
            blocks[storage] = block
            if card.allocated_bytes > peak:
                peak, peak_at = card.allocated_bytes, index
    return Replay(
        peak_allocated_bytes=card.peak_allocated_bytes,
        peak_reserved_bytes=card.peak_reserved_bytes,
        peak_at=peak_at,
        out_of_memory_at=failed,
    )


def live_storages_at(events: Sequence[Event], index: int) -> list[Storage]:
    """The storages that are there once the event at `index` has happened, oldest first."""
    alive: dict[Storage, None] = {}
    for storage, is_allocation in events[: index + 1]:
        if is_allocation:
            alive[storage] = None
        else:
            del alive[storage]
    return list(alive)
