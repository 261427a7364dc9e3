"""What a traced operation asks of a card: products, bytes read and written, kernels launched, and in what precision.

The recorder (`trace`) calls `describe_operation` for each operation while it is told to list them. Views, allocations and
questions about a tensor launch nothing and are left out. Bytes are those of the tensors' own elements: what is expanded
counts once, a gather reads what it returns. FLOPs are those of `torch.utils.flop_counter`, which is the convention of
published utilisations: a multiply-add is two, and causal attention counts in full although flash kernels skip the upper
half (so their share of the peak, lower than a plain product's, is hidden in the half that they skip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from lowvram_chat.tracing.kernels import (
    GATHERS,
    INTERNAL_BYTES,
    ITEM_OPERATION,
    KERNELS_PER_OPERATION,
    SPARSELY_ACCESSED_ARGUMENT,
    KernelInfo,
    kernel_info,
)

Precision = Literal["half", "single", "none"]
"""Of an operation's products: fp16 or bf16, fp32 (TF32 where it is allowed), or no products at all."""
BytesByStorage = dict[object, int]
"""Storage -> bytes."""
StorageOf = Callable[[torch.Tensor], object]
"""Tensor -> what stands for its storage."""


class Access(NamedTuple):
    """Elements of one storage that an operation reads or writes."""

    storage: object
    nbytes: int


class Operation(NamedTuple):
    """One traced operation that launches kernels."""

    name: str
    phase: str
    flops: int
    precision: Precision
    unaligned: tuple[Access, ...]
    """Those of its product's matrices whose rows do not all begin at multiples of `ALIGNMENT_BYTES`."""
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    launches: int
    waits: bool
    """Whether the host waits for its result, as `.item()` does."""

    @property
    def nbytes(self) -> int:
        """Bytes that pass between the card's memory and its processors."""
        return sum(piece.nbytes for piece in self.reads) + sum(piece.nbytes for piece in self.writes)


Work = Sequence[Sequence[Operation]]
"""The operations of an optimizer step: a list for each of one or two micro-batches, and one for the update."""

ALIGNMENT_BYTES = 16
"""Tensor-core kernels load this much at a time. Source: NVIDIA, Matrix Multiplication Background User's Guide, section
"Tensor Core Requirements": dimensions that are multiples of 16 bytes."""
HALF_TYPES = frozenset({torch.float16, torch.bfloat16})
CHUNK_ELEMENTS, CHUNKS_PER_LAUNCH, TENSORS_PER_LAUNCH = 65536, 320, (110, 64, 48, 36, 30)
"""Elements of a chunk; chunks of a launch; tensors of a launch over one to five lists.
Source: aten/src/ATen/native/cuda/MultiTensorApply.cuh, `kChunkSize`, `depth_to_max_blocks`, `depth_to_max_tensors`."""


def describe_operation(
    func: Any, args: tuple[Any, ...], result: Any, moment: str, storage_of: StorageOf
) -> Operation | None:
    """Returns what an operation asks of the card; None where it launches nothing.

    `storage_of` gives what stands for a tensor's storage: the same object for the same storage, and no other's.
    """
    kind = kernel_info(func)
    if not kind.launches:
        return None
    reads, writes = _moved(kind, args, result, storage_of)
    matrices = [tensor for tensor in _tensors(args[:3]) if tensor.dim() > 1] if kind.flops else []
    products = [*matrices, *_tensors(result)] if kind.flops else []
    return Operation(
        name=kind.name,
        phase=moment,
        flops=kind.flops(*args, out_val=result) if kind.flops else 0,
        precision=_precision(matrices),
        unaligned=tuple(Access(storage_of(one), _bytes(one)) for one in products if not _is_aligned(one)),
        reads=tuple(Access(*item) for item in reads.items()),
        writes=tuple(Access(*item) for item in writes.items()),
        launches=_multi_launches(args) if kind.is_multi else KERNELS_PER_OPERATION.get(kind.name, 1),
        waits=func is ITEM_OPERATION,
    )


def _moved(
    kind: KernelInfo, args: tuple[Any, ...], result: Any, storage_of: StorageOf
) -> tuple[BytesByStorage, BytesByStorage]:
    """What an operation reads and what it writes."""
    reads: BytesByStorage = {}
    writes: BytesByStorage = {}
    for place, argument in enumerate(() if kind.fills else args):
        is_written = place in kind.written
        for tensor in _tensors(argument):
            if is_written:
                _add(writes, storage_of(tensor), _bytes(tensor))
            if not (is_written and kind.overwritten):
                _add(reads, storage_of(tensor), _bytes(tensor))
    if kind.name in GATHERS:
        reads[storage_of(args[0])] = _bytes(result)
    if kind.name in SPARSELY_ACCESSED_ARGUMENT:
        table = storage_of(args[SPARSELY_ACCESSED_ARGUMENT[kind.name]])
        for pieces in (reads, writes):
            pieces.update(dict.fromkeys(pieces.keys() & {table}, 0))
    for tensor in _tensors(result):
        if storage_of(tensor) not in reads.keys() | writes.keys():
            writes[storage_of(tensor)] = _bytes(tensor)
    if kind.name in INTERNAL_BYTES:
        writes[object()] = INTERNAL_BYTES[kind.name](args)
    return reads, writes


def _add(pieces: BytesByStorage, storage: object, nbytes: int) -> None:
    """Adds elements of a storage; the same ones again, as in a product with itself, count once."""
    pieces[storage] = max(nbytes, pieces.get(storage, 0))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements: those of an expanded one are there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _precision(matrices: list[torch.Tensor]) -> Precision:
    if not matrices:
        return "none"
    return "half" if matrices[0].dtype in HALF_TYPES else "single"


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether the rows (or columns, where it is transposed) of a matrix begin at multiples of `ALIGNMENT_BYTES`."""
    if matrix.dim() < 2 or not matrix.is_floating_point():  # log-sums of attention; packed weights
        return True
    step = max(matrix.stride()[-2:])
    return bool(step * matrix.element_size() % ALIGNMENT_BYTES == 0)


def _multi_launches(args: tuple[Any, ...]) -> int:
    """Launches of an operation over lists of tensors: as many as its chunks, or its tensors, need."""
    lists = [argument for argument in args if isinstance(argument, (list, tuple)) and argument]
    if not lists:
        return 1
    chunks = sum(math.ceil(tensor.numel() / CHUNK_ELEMENTS) for tensor in _tensors(lists[0]))
    tensors = TENSORS_PER_LAUNCH[min(len(lists), len(TENSORS_PER_LAUNCH)) - 1]
    return max(1, math.ceil(chunks / CHUNKS_PER_LAUNCH), math.ceil(len(lists[0]) / tensors))
