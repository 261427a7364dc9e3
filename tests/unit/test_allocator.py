"""The allocator simulator keeps the real one's invariants under any traffic, and its rules case by case."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_chat.planning.allocator import Block, CachingAllocator, segment_bytes
from lowvram_chat.units import MIB

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 64 * MIB))
TRAFFIC = st.lists(st.one_of(SIZES, st.integers(-40, -1)), max_size=120)
"""A positive number is a request in bytes; a negative one frees one of the blocks held."""


def _must(block: Block | None) -> Block:
    assert block is not None
    return block


def _run(card: CachingAllocator, traffic: list[int]) -> list[tuple[Block, int]]:
    """Returns the blocks held in the end, with the bytes asked for."""
    held: list[tuple[Block, int]] = []
    for item in traffic:
        if item < 0 and held:
            card.free(held.pop(item % len(held))[0])
        elif item > 0:
            block = card.malloc(item)
            if block is not None:
                held.append((block, item))
    return held


def _segments(card: CachingAllocator, held: list[tuple[Block, int]]) -> list[list[Block]]:
    """Every segment as the chain of its blocks, found from the held and the free ones."""
    known = [block for block, _ in held] + [*card.small.by_address.values(), *card.large.by_address.values()]
    heads = {id(head): head for head in map(_head, known)}
    chains = []
    for head in heads.values():
        chain: list[Block] = [head]
        while chain[-1].after is not None:
            chain.append(chain[-1].after)
        chains.append(chain)
    return chains


def _head(block: Block) -> Block:
    while block.before is not None:
        block = block.before
    return block


@given(TRAFFIC, st.sampled_from([None, 24 * MIB, 100 * MIB]))
def test_blocks_tile_their_segments_and_the_sums_agree(traffic: list[int], limit: int | None) -> None:
    card = CachingAllocator(limit)
    held = _run(card, traffic)
    chains = _segments(card, held)
    for chain in chains:
        assert all(left.address + left.nbytes == right.address for left, right in pairwise(chain))
        assert not any(left.free and right.free for left, right in pairwise(chain)), "not joined"
    assert card.reserved_bytes == sum(block.nbytes for chain in chains for block in chain)
    assert card.allocated_bytes == sum(block.nbytes for block, _ in held)
    assert card.allocated_bytes <= card.reserved_bytes <= card.peak_reserved_bytes
    assert limit is None or card.peak_reserved_bytes <= limit


@given(TRAFFIC)
def test_held_blocks_are_large_enough_and_never_overlap(traffic: list[int]) -> None:
    held = _run(CachingAllocator(), traffic)
    assert all(block.nbytes >= asked for block, asked in held)
    spans = sorted((block.address, block.address + block.nbytes) for block, _ in held)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


@given(TRAFFIC)
def test_what_is_freed_can_all_go_back_to_the_driver(traffic: list[int]) -> None:
    card = CachingAllocator()
    for block, _ in _run(card, traffic):
        card.free(block)
    card.release_cached()
    assert (card.allocated_bytes, card.reserved_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB)],
)
def test_a_segment_has_the_size_that_torch_asks_for(request_bytes: int, segment: int) -> None:
    assert segment_bytes(request_bytes) == segment
    assert segment_bytes(11 * MIB) == 12 * MIB


def test_a_remainder_of_one_mib_is_not_cut_off_in_the_large_pool() -> None:
    card = CachingAllocator()
    assert _must(card.malloc(15 * MIB)).nbytes == 16 * MIB
    assert _must(card.malloc(19 * MIB - 512)).nbytes == 19 * MIB - 512


def test_the_smallest_block_that_holds_a_request_is_taken() -> None:
    card = CachingAllocator()
    small, large = _must(card.malloc(30 * MIB)), _must(card.malloc(40 * MIB))
    card.free(large)
    card.free(small)
    assert _must(card.malloc(25 * MIB)).address == small.address
    assert card.reserved_bytes == 70 * MIB


def test_a_full_card_releases_its_cache_before_it_gives_up() -> None:
    card = CachingAllocator(limit_bytes=100 * MIB)
    card.free(_must(card.malloc(60 * MIB)))
    block = _must(card.malloc(80 * MIB))
    assert card.reserved_bytes == 80 * MIB
    assert card.malloc(40 * MIB) is None
    assert block.nbytes == 80 * MIB


def test_a_segment_with_one_block_in_use_is_not_released() -> None:
    card = CachingAllocator(limit_bytes=100 * MIB)
    first = _must(card.malloc(60 * MIB))
    card.free(first)
    _must(card.malloc(4 * MIB))
    assert card.malloc(80 * MIB) is None
    assert _must(card.malloc(50 * MIB)).nbytes == 50 * MIB
