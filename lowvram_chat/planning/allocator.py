"""Simulates PyTorch's CUDA caching allocator: from allocations and frees of tensors to the peak that a GPU would show.

A GPU needs more memory than its tensors. The allocator requests segments of 2 MiB, 20 MiB or more from the driver, splits
them into blocks, and keeps what is freed. `CachingAllocator` follows these rules block by block. It simulates addresses
too, because the allocator chooses among free blocks of equal size by address.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.6): `malloc`, `free_block`, `get_free_block`, `alloc_block`,
`should_split`, `release_cached_blocks`, with its default settings (no max_split_size, no expandable segments).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lowvram_chat.units import MIB

ROUND_BYTES = 512
"""Requests are rounded up to a multiple of this, and no block is smaller (kMinBlockSize)."""
SMALL_REQUEST_BYTES = 1 * MIB
"""Requests up to this size use the small pool (kSmallSize)."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""Segments of the small pool (kSmallBuffer)."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""Segments for requests between `SMALL_REQUEST_BYTES` and `LARGE_REQUEST_BYTES` (kLargeBuffer)."""
LARGE_REQUEST_BYTES = 10 * MIB
"""Requests of at least this size get a segment of their own size (kMinLargeAlloc)."""
LARGE_ROUND_BYTES = 2 * MIB
"""Such segments are rounded up to a multiple of this (kRoundLarge)."""


def round_up(nbytes: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


def segment_bytes(rounded_bytes: int) -> int:
    """Return the bytes requested from the driver when no cached block is large enough for a (rounded) request."""
    if rounded_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(rounded_bytes, LARGE_ROUND_BYTES)


@dataclass(slots=True, eq=False)
class Block:
    """A contiguous range of bytes in one segment. `before` and `after` are its neighbours in the segment."""

    address: int
    nbytes: int
    pool: FreeBlocks
    free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        """Whether the block spans its whole segment, so that the segment can be returned to the driver."""
        return self.before is None and self.after is None


@dataclass(slots=True)
class FreeBlocks:
    """The free blocks of one pool, sorted by size, then by address, so that best fit is a bisection."""

    smallest_remainder_bytes: int
    """Bytes that must remain for a block to be split."""
    keys: list[tuple[int, int]] = field(default_factory=list)
    """Size and address of each block, sorted."""
    by_address: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """Add a block."""
        insort(self.keys, (block.nbytes, block.address))
        self.by_address[block.address] = block

    def remove(self, block: Block) -> None:
        """Remove a block."""
        del self.keys[bisect_left(self.keys, (block.nbytes, block.address))]
        del self.by_address[block.address]

    def best_fit(self, nbytes: int) -> Block | None:
        """Return the smallest free block of at least `nbytes`; among equals, the one at the lowest address."""
        index = bisect_left(self.keys, (nbytes, 0))
        return self.by_address[self.keys[index][1]] if index < len(self.keys) else None


class CachingAllocator:
    """The caching allocator of one device. `limit_bytes` is the most that it may reserve (None: no limit)."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.small = FreeBlocks(smallest_remainder_bytes=ROUND_BYTES)
        self.large = FreeBlocks(smallest_remainder_bytes=SMALL_REQUEST_BYTES + 1)
        self._next_address = LARGE_ROUND_BYTES

    def malloc(self, nbytes: int) -> Block | None:
        """Return a block for a tensor of `nbytes`, or None if the device is full even after the cache was released.

        A block that is too small to split is larger than requested. It counts in full, as in `torch.cuda.memory_allocated`.
        """
        nbytes = max(round_up(nbytes, ROUND_BYTES), ROUND_BYTES)
        pool = self.small if nbytes <= SMALL_REQUEST_BYTES else self.large
        block = pool.best_fit(nbytes) or self._new_segment(segment_bytes(nbytes), pool)
        if block is None:
            return None
        pool.remove(block)
        if block.nbytes - nbytes >= pool.smallest_remainder_bytes:
            self._split(block, nbytes)
        block.free = False
        self.allocated_bytes += block.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, merged with its free neighbours."""
        assert not block.free, "double free"
        self.allocated_bytes -= block.nbytes
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                block.pool.remove(neighbour)
                _merge(block, neighbour)
        block.pool.add(block)

    def release_cached(self) -> None:
        """Return every segment without allocated blocks to the driver (`torch.cuda.empty_cache`)."""
        for pool in (self.small, self.large):
            for block in [block for block in pool.by_address.values() if block.is_whole_segment]:
                pool.remove(block)
                self.reserved_bytes -= block.nbytes

    def _new_segment(self, nbytes: int, pool: FreeBlocks) -> Block | None:
        """Reserve a segment and return it as one free block, or None if it exceeds the limit."""
        if not self._fits(nbytes):
            self.release_cached()
        if not self._fits(nbytes):
            return None
        block = Block(self._next_address, nbytes, pool)
        self._next_address += nbytes
        self.reserved_bytes += nbytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        pool.add(block)
        return block

    def _fits(self, nbytes: int) -> bool:
        """Return whether `nbytes` more may be reserved."""
        return self.limit_bytes is None or self.reserved_bytes + nbytes <= self.limit_bytes

    def _split(self, block: Block, nbytes: int) -> None:
        """Shorten a block to `nbytes`, and add the remainder to its pool."""
        remainder = Block(block.address + nbytes, block.nbytes - nbytes, block.pool, before=block, after=block.after)
        if block.after is not None:
            block.after.before = remainder
        block.after, block.nbytes = remainder, nbytes
        block.pool.add(remainder)


def _merge(block: Block, neighbour: Block) -> None:
    """Extend `block` over an adjacent block."""
    block.nbytes += neighbour.nbytes
    if neighbour is block.before:
        block.address, block.before = neighbour.address, neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
