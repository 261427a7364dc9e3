"""Torch's CUDA caching allocator, simulated: from births and deaths of tensors to the peak that a card would show.

A card needs more than its tensors: the allocator asks the driver for segments of 2 MiB, 20 MiB or more, cuts them into
blocks, and keeps what is freed. `CachingAllocator` follows those rules block by block. Addresses are simulated too,
because ties between free blocks are decided by address.

Source: c10/cuda/CUDACachingAllocator.cpp (torch 2.6): `malloc`, `free_block`, `get_free_block`, `alloc_block`,
`should_split`, `release_cached_blocks`, with its default settings (no max_split_size, no expandable segments).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lowvram_chat.units import MIB

ROUND_BYTES = 512
"""Every request is rounded up to this, and no block is smaller (kMinBlockSize)."""
SMALL_REQUEST_BYTES = 1 * MIB
"""Requests up to this come from the small pool (kSmallSize)."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
LARGE_REQUEST_BYTES = 10 * MIB
"""Requests from this size on get a segment of their own size (kMinLargeAlloc)."""
LARGE_ROUND_BYTES = 2 * MIB


def round_up(nbytes: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


def segment_bytes(rounded_bytes: int) -> int:
    """Bytes that the driver is asked for when no cached block holds a (rounded) request."""
    if rounded_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(rounded_bytes, LARGE_ROUND_BYTES)


@dataclass(slots=True, eq=False)
class Block:
    """A run of bytes inside one segment; its neighbours there are `before` and `after`."""

    address: int
    nbytes: int
    pool: FreeBlocks
    free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        """True when nothing was cut from the segment, so that it can go back to the driver."""
        return self.before is None and self.after is None


@dataclass(slots=True)
class FreeBlocks:
    """The free blocks of one pool, sorted by size, then by address: best fit is a bisection."""

    smallest_remainder_bytes: int
    """What must be left over for a block to be cut in two."""
    keys: list[tuple[int, int]] = field(default_factory=list)
    by_address: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """Takes a block in."""
        insort(self.keys, (block.nbytes, block.address))
        self.by_address[block.address] = block

    def remove(self, block: Block) -> None:
        """Takes a block out."""
        del self.keys[bisect_left(self.keys, (block.nbytes, block.address))]
        del self.by_address[block.address]

    def best_fit(self, nbytes: int) -> Block | None:
        """The smallest free block of at least `nbytes`, the lowest address among equals."""
        place = bisect_left(self.keys, (nbytes, 0))
        return self.by_address[self.keys[place][1]] if place < len(self.keys) else None


class CachingAllocator:
    """One card's caching allocator; `limit_bytes` caps what it may reserve (None: no limit)."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.small = FreeBlocks(smallest_remainder_bytes=ROUND_BYTES)
        self.large = FreeBlocks(smallest_remainder_bytes=SMALL_REQUEST_BYTES + 1)
        self._next_address = LARGE_ROUND_BYTES

    def malloc(self, nbytes: int) -> Block | None:
        """A block for a tensor of `nbytes`; None when the card is full even after the cache was released.

        A block that could not be cut is larger than asked, and counts in full, as `torch.cuda.memory_allocated` does.
        """
        nbytes = max(round_up(nbytes, ROUND_BYTES), ROUND_BYTES)
        pool = self.small if nbytes <= SMALL_REQUEST_BYTES else self.large
        block = pool.best_fit(nbytes) or self._new_segment(segment_bytes(nbytes), pool)
        if block is None:
            return None
        pool.remove(block)
        if block.nbytes - nbytes >= pool.smallest_remainder_bytes:
            self._cut(block, nbytes)
        block.free = False
        self.allocated_bytes += block.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Gives a block back to its pool, joined with free neighbours."""
        assert not block.free, "double free"
        self.allocated_bytes -= block.nbytes
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                block.pool.remove(neighbour)
                _join(block, neighbour)
        block.pool.add(block)

    def release_cached(self) -> None:
        """Returns every wholly free segment to the driver (`torch.cuda.empty_cache`)."""
        for pool in (self.small, self.large):
            for block in [block for block in pool.by_address.values() if block.is_whole_segment]:
                pool.remove(block)
                self.reserved_bytes -= block.nbytes

    def _new_segment(self, nbytes: int, pool: FreeBlocks) -> Block | None:
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
        return self.limit_bytes is None or self.reserved_bytes + nbytes <= self.limit_bytes

    def _cut(self, block: Block, nbytes: int) -> None:
        rest = Block(block.address + nbytes, block.nbytes - nbytes, block.pool, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, nbytes
        block.pool.add(rest)


def _join(block: Block, neighbour: Block) -> None:
    """Widens `block` over a neighbour that touches it."""
    block.nbytes += neighbour.nbytes
    if neighbour is block.before:
        block.address, block.before = neighbour.address, neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
