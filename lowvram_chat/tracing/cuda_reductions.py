"""The buffers of CUDA's reduction kernel, with which several blocks of threads share the work of one sum.

A bias's gradient is a sum over all tokens. There are more multiprocessors than columns to keep them busy, so the rows are divided
among blocks, which meet in a buffer of the device.
Source: aten/src/ATen/native/cuda/Reduce.cuh, `setReduceConfig`, `ReduceConfig`, `gpu_reduce_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lowvram_chat.tracing.dispatch import Arguments, Operator, tensor_at

aten = torch.ops.aten

PROCESSORS = 16
"""Multiprocessors of the RTX 3050 Laptop. Other small cards have 10 to 24, which changes a buffer by a few MiB at most."""
MAX_THREADS, WARP = 512, 32
"""Threads in a block (MAX_NUM_THREADS), and in a warp."""
MIN_VALUES, MAX_VALUES = 16, 256
"""Values that a thread sums at least and at most (min_values_per_thread, max_values_per_thread)."""
VECTOR = 4
"""Values that are read at once (vt0)."""
ACCUMULATOR_BYTES = 4
"""Sums are kept in fp32."""
REDUCED = {aten.sum.default: 1, aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.linalg_vector_norm.default: 2}
"""Operation -> position of the dimensions among its arguments; without them it reduces all."""


class Grid(NamedTuple):
    """What a device runs at once."""

    processors: int
    threads: int
    """Threads of each multiprocessor."""


class Reduction(NamedTuple):
    """A sum over the rows or the columns of a contiguous matrix."""

    outputs: int
    inputs: int
    """Values that each output is the sum of."""
    by_rows: bool
    """Whether the values of one output lie side by side."""


def threads_per_processor(compute_capability: tuple[int, int]) -> int:
    """Return the threads that a multiprocessor holds. Source: CUDA C++ Programming Guide, "Technical specifications"."""
    if compute_capability < (8, 0):
        return 1024
    return 2048 if compute_capability == (8, 0) else 1536


def reduction_buffers(func: Operator, args: Arguments, grid: Grid) -> list[int]:
    """Return the sizes, in bytes, of what a reduction shares between blocks of threads: partial sums, and a counter of each."""
    if func not in REDUCED:
        return []
    source, place = tensor_at(args, 0), REDUCED[func]
    dimensions = args[place] if len(args) > place else None
    reduction = _reduction(source, dimensions if isinstance(dimensions, (list, tuple)) else [])
    return [] if reduction is None else _shared_bytes(reduction, grid)


def _reduction(source: torch.Tensor, dimensions: Sequence[int]) -> Reduction | None:
    """Return the reduction of a dense tensor, in the order of its memory; None if it is over dimensions in the middle."""
    strides = source.stride()
    order = sorted(range(source.dim()), key=strides.__getitem__, reverse=True)
    if not source.numel() or not source.permute(order).is_contiguous():
        return None
    reduced = {number % source.dim() for number in dimensions} or {*order}
    counted = [number for number in order if source.shape[number] != 1]
    wanted = [number for number in counted if number in reduced]
    inputs = math.prod(source.shape[number] for number in wanted)
    if not wanted or wanted == counted[len(counted) - len(wanted) :]:
        return Reduction(source.numel() // inputs, inputs, by_rows=True)
    leading = wanted == counted[: len(wanted)]
    return Reduction(source.numel() // inputs, inputs, by_rows=False) if leading else None


def _shared_bytes(reduction: Reduction, grid: Grid) -> list[int]:
    """Return the bytes of the partial sums and of the counters; nothing where one block computes a whole output."""
    outputs, inputs, by_rows = reduction
    vector = 1 if by_rows else next(size for size in (VECTOR, 2, 1) if outputs % size == 0)
    wide, high = (inputs, outputs) if by_rows else (outputs // vector, inputs)
    if by_rows and wide >= MAX_THREADS // VECTOR:
        wide //= VECTOR
    width, height = _block(wide, high, MAX_THREADS // vector)
    per_block = width if by_rows else 1
    values = -(-inputs // per_block)
    if values < min(height * MIN_VALUES, MAX_VALUES):
        return []  # each row of threads has outputs of its own
    values = -(-inputs // (per_block * height))
    blocks = -(-(outputs // vector) // (1 if by_rows else width))
    target = grid.processors * (grid.threads // (width * height))
    if values < MAX_VALUES or blocks > target:
        return []
    shares = min(max(-(-target // blocks), -(-values // MAX_VALUES)), -(-values // MIN_VALUES))
    if shares <= 1:
        return []
    sums = ACCUMULATOR_BYTES * outputs * shares * (1 if by_rows else width * vector)
    return [sums, ACCUMULATOR_BYTES * blocks]


def _block(wide: int, high: int, threads: int) -> tuple[int, int]:
    """Return the width and the height of a block of threads (`set_block_dimension`)."""
    widest, highest = min(_power_of_two(wide), threads), min(_power_of_two(high), threads)
    height = min(highest, threads // min(widest, WARP))
    return min(widest, threads // height), height


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not above a number."""
    return 1 << (max(1, number).bit_length() - 1)
