"""The simulated allocator keeps the invariants of the real one under any traffic, and follows its rules case by case."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_chat.planning.allocator import Block, CachingAllocator, segment_bytes
from lowvram_chat.units import MIB

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 64 * MIB))
TRAFFIC = st.lists(st.one_of(SIZES, st.integers(-40, -1)), max_size=120)
"""A positive number is a request in bytes. A negative number frees one of the allocated blocks."""


def _not_none(block: Block | None) -> Block:
    assert block is not None
    return block


def _run(allocator: CachingAllocator, traffic: list[int]) -> list[tuple[Block, int]]:
    """Return the blocks that are allocated in the end, with the requested bytes."""
    allocated: list[tuple[Block, int]] = []
    for item in traffic:
        if item < 0 and allocated:
            allocator.free(allocated.pop(item % len(allocated))[0])
        elif item > 0:
            block = allocator.malloc(item)
            if block is not None:
                allocated.append((block, item))
    return allocated


def _segments(allocator: CachingAllocator, allocated: list[tuple[Block, int]]) -> list[list[Block]]:
    """Return every segment as the chain of its blocks, found from the allocated and the free blocks."""
    known = [block for block, _ in allocated] + [
        *allocator.small.by_address.values(),
        *allocator.large.by_address.values(),
    ]
    heads = {id(head): head for head in map(_head, known)}
    chains = []
    for head in heads.values():
        chain: list[Block] = [head]
        while chain[-1].after is not None:
            chain.append(chain[-1].after)
        chains.append(chain)
    return chains


def _head(block: Block) -> Block:
    """Return the first block of a segment."""
    while block.before is not None:
        block = block.before
    return block


@given(TRAFFIC, st.sampled_from([None, 24 * MIB, 100 * MIB]))
def test_blocks_tile_their_segments_and_the_sums_agree(traffic: list[int], limit: int | None) -> None:
    allocator = CachingAllocator(limit)
    allocated = _run(allocator, traffic)
    chains = _segments(allocator, allocated)
    for chain in chains:
        assert all(left.address + left.nbytes == right.address for left, right in pairwise(chain))
        assert not any(left.free and right.free for left, right in pairwise(chain)), "not merged"
    assert allocator.reserved_bytes == sum(block.nbytes for chain in chains for block in chain)
    assert allocator.allocated_bytes == sum(block.nbytes for block, _ in allocated)
    assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    assert limit is None or allocator.peak_reserved_bytes <= limit


@given(TRAFFIC)
def test_allocated_blocks_are_large_enough_and_never_overlap(traffic: list[int]) -> None:
    allocated = _run(CachingAllocator(), traffic)
    assert all(block.nbytes >= requested for block, requested in allocated)
    spans = sorted((block.address, block.address + block.nbytes) for block, _ in allocated)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


@given(TRAFFIC)
def test_all_freed_memory_can_be_returned_to_the_driver(traffic: list[int]) -> None:
    allocator = CachingAllocator()
    for block, _ in _run(allocator, traffic):
        allocator.free(block)
    allocator.release_cached()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB)],
)
def test_a_segment_has_the_size_that_pytorch_requests(request_bytes: int, segment: int) -> None:
    assert segment_bytes(request_bytes) == segment
    assert segment_bytes(11 * MIB) == 12 * MIB


def test_a_remainder_of_one_mib_is_not_split_off_in_the_large_pool() -> None:
    allocator = CachingAllocator()
    assert _not_none(allocator.malloc(15 * MIB)).nbytes == 16 * MIB
    assert _not_none(allocator.malloc(19 * MIB - 512)).nbytes == 19 * MIB - 512


def test_the_smallest_block_that_fits_a_request_is_used() -> None:
    allocator = CachingAllocator()
    small, large = _not_none(allocator.malloc(30 * MIB)), _not_none(allocator.malloc(40 * MIB))
    allocator.free(large)
    allocator.free(small)
    assert _not_none(allocator.malloc(25 * MIB)).address == small.address
    assert allocator.reserved_bytes == 70 * MIB


def test_a_full_device_releases_its_cache_before_an_allocation_fails() -> None:
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    allocator.free(_not_none(allocator.malloc(60 * MIB)))
    block = _not_none(allocator.malloc(80 * MIB))
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.malloc(40 * MIB) is None
    assert block.nbytes == 80 * MIB


def test_a_segment_with_an_allocated_block_is_not_released() -> None:
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    first = _not_none(allocator.malloc(60 * MIB))
    allocator.free(first)
    _not_none(allocator.malloc(4 * MIB))
    assert allocator.malloc(80 * MIB) is None
    assert _not_none(allocator.malloc(50 * MIB)).nbytes == 50 * MIB
