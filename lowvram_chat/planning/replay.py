"""Replays a trace through the allocator: the peaks, where they occur, and whether the device has enough memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowvram_chat.planning.allocator import Block, CachingAllocator
from lowvram_chat.tracing.recorder import CACHE_RELEASE, Event, Storage


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a device would report, in bytes."""

    peak_allocated_bytes: int
    """`torch.cuda.max_memory_allocated`."""
    peak_reserved_bytes: int
    """`torch.cuda.max_memory_reserved`."""
    peak_at: int
    """Index of the event that raised the allocated memory to its peak."""
    out_of_memory_at: Storage | None
    """The storage that could not be allocated. None: the whole trace fitted."""


def replay(events: Iterable[Event], limit_bytes: int | None = None) -> Replay:
    """Return the peaks of a trace on a device whose allocator may reserve `limit_bytes` (None: no limit)."""
    allocator = CachingAllocator(limit_bytes)
    blocks: dict[Storage, Block] = {}
    out_of_memory_at = None
    peak = peak_at = 0
    for index, (storage, is_allocation) in enumerate(events):
        if not storage.nbytes:
            if storage.category == CACHE_RELEASE:
                allocator.release_cached()
            continue
        if not is_allocation:
            allocator.free(blocks.pop(storage))
            continue
        block = allocator.malloc(storage.nbytes)
        if block is None:
            out_of_memory_at = storage
            break
        blocks[storage] = block
        if allocator.allocated_bytes > peak:
            peak, peak_at = allocator.allocated_bytes, index
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_at=peak_at,
        out_of_memory_at=out_of_memory_at,
    )


def live_storages_at(events: Sequence[Event], index: int) -> list[Storage]:
    """Return the storages that are live after the event at `index`, in order of allocation."""
    live: dict[Storage, None] = {}
    for storage, is_allocation in events[: index + 1]:
        if is_allocation:
            live[storage] = None
        else:
            del live[storage]
    return list(live)
