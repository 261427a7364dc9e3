"""What a traced operation costs on a device: FLOPs, bytes read and written, kernel launches, and precision.

While `TraceRecorder.operations` is a list, the recorder calls `describe_operation` for each operation. Views,
allocations and metadata queries launch no kernel and are left out.

- Bytes are those of a tensor's own elements: an expanded tensor counts once, and a gather reads as much as it returns.
- FLOPs are those of `torch.utils.flop_counter`, the convention of published utilisations. A multiply-add counts as two,
  and causal attention counts in full, although flash kernels skip the upper half. Flash kernels reach a lower share of the
  peak rate than a plain product does; the half that they skip hides this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from lowvram_chat.tracing.dispatch import Arguments, Operator, tensor_at, tensors_in
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
"""Precision of an operation's matrix products: fp16 or bf16, fp32 (or TF32, where allowed), or no products at all."""
BytesByStorage = dict[object, int]
"""Storage -> bytes."""
StorageOf = Callable[[torch.Tensor], object]
"""Tensor -> an object that identifies its storage."""


class Access(NamedTuple):
    """The elements of one storage that an operation reads or writes."""

    storage: object
    nbytes: int


class Operation(NamedTuple):
    """One traced operation that launches kernels."""

    name: str
    phase: str
    """Phase of the step: forward, loss, backward, clipping, optimizer."""
    flops: int
    precision: Precision
    unaligned: tuple[Access, ...]
    """Matrices of its product whose rows do not all begin at multiples of `ALIGNMENT_BYTES`."""
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    launches: int
    """Kernels."""
    synchronizes: bool
    """Whether the host waits for its result, as `.item()` does."""

    @property
    def nbytes(self) -> int:
        """Bytes moved between the device's memory and its processors."""
        return sum(access.nbytes for access in self.reads) + sum(access.nbytes for access in self.writes)


Work = Sequence[Sequence[Operation]]
"""The operations of an optimizer step: a list for each of one or two micro-batches, and one for the update."""

ALIGNMENT_BYTES = 16
"""Bytes that tensor-core kernels load at a time. Source: NVIDIA, Matrix Multiplication Background User's Guide, section
"Tensor Core Requirements": dimensions that are multiples of 16 bytes."""
HALF_TYPES = frozenset({torch.float16, torch.bfloat16})
CHUNK_ELEMENTS, CHUNKS_PER_LAUNCH, TENSORS_PER_LAUNCH = 65536, 320, (110, 64, 48, 36, 30)
"""Elements per chunk; chunks per launch; tensors per launch over one to five lists.
Source: aten/src/ATen/native/cuda/MultiTensorApply.cuh, `kChunkSize`, `depth_to_max_blocks`, `depth_to_max_tensors`."""


def describe_operation(
    func: Operator, args: Arguments, result: object, phase: str, storage_of: StorageOf
) -> Operation | None:
    """Return what an operation costs on the device, or None if it launches no kernel.

    `storage_of` must return the same object for tensors that share a storage, and different objects otherwise.
    """
    kernel = kernel_info(func)
    if not kernel.launches:
        return None
    reads, writes = _accesses(kernel, args, result, storage_of)
    factors = [tensor for tensor in tensors_in(args[:3]) if tensor.dim() > 1] if kernel.flops else []
    matrices = [*factors, *tensors_in(result)] if kernel.flops else []
    return Operation(
        name=kernel.name,
        phase=phase,
        flops=kernel.flops(*args, out_val=result) if kernel.flops else 0,
        precision=_precision(factors),
        unaligned=tuple(Access(storage_of(matrix), _bytes(matrix)) for matrix in matrices if not _is_aligned(matrix)),
        reads=tuple(Access(*item) for item in reads.items()),
        writes=tuple(Access(*item) for item in writes.items()),
        launches=_multi_tensor_launches(args) if kernel.is_multi_tensor else KERNELS_PER_OPERATION.get(kernel.name, 1),
        synchronizes=func is ITEM_OPERATION,
    )


def _accesses(
    kernel: KernelInfo, args: Arguments, result: object, storage_of: StorageOf
) -> tuple[BytesByStorage, BytesByStorage]:
    """Return what an operation reads and what it writes."""
    reads, writes = _argument_accesses(kernel, args, storage_of)
    if kernel.name in GATHERS:
        reads[storage_of(tensor_at(args, 0))] = sum(map(_bytes, tensors_in(result)))
    if kernel.name in SPARSELY_ACCESSED_ARGUMENT:
        sparse = storage_of(tensor_at(args, SPARSELY_ACCESSED_ARGUMENT[kernel.name]))
        for accesses in (reads, writes):
            if sparse in accesses:
                accesses[sparse] = 0
    for tensor in tensors_in(result):
        if storage_of(tensor) not in reads.keys() | writes.keys():
            writes[storage_of(tensor)] = _bytes(tensor)
    if kernel.name in INTERNAL_BYTES:
        writes[object()] = INTERNAL_BYTES[kernel.name](*args)
    return reads, writes


def _argument_accesses(
    kernel: KernelInfo, args: Arguments, storage_of: StorageOf
) -> tuple[BytesByStorage, BytesByStorage]:
    """Return what an operation reads and writes of its arguments, by its schema alone."""
    reads: BytesByStorage = {}
    writes: BytesByStorage = {}
    for position, argument in enumerate(() if kernel.fills else args):
        is_written = position in kernel.written
        for tensor in tensors_in(argument):
            if is_written:
                _add(writes, storage_of(tensor), _bytes(tensor))
            if not (is_written and kernel.overwrites):
                _add(reads, storage_of(tensor), _bytes(tensor))
    return reads, writes


def _add(accesses: BytesByStorage, storage: object, nbytes: int) -> None:
    """Add an access to a storage; two accesses to one storage, as in a product with itself, count once."""
    accesses[storage] = max(nbytes, accesses.get(storage, 0))


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's own elements; those of an expanded tensor count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _precision(factors: list[torch.Tensor]) -> Precision:
    """Return the precision of a product of these matrices."""
    if not factors:
        return "none"
    return "half" if factors[0].dtype in HALF_TYPES else "single"


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Return whether a matrix's rows (columns, if it is transposed) begin at multiples of `ALIGNMENT_BYTES`."""
    if matrix.dim() < 2 or not matrix.is_floating_point():  # the log-sum-exp of attention; packed weights
        return True
    step = max(matrix.stride()[-2:])
    return step * matrix.element_size() % ALIGNMENT_BYTES == 0


def _multi_tensor_launches(args: Arguments) -> int:
    """Return the launches of an operation over lists of tensors: as many as its chunks, or its tensors, need."""
    lists = [argument for argument in args if isinstance(argument, (list, tuple)) and argument]
    if not lists:
        return 1
    chunks = sum(math.ceil(tensor.numel() / CHUNK_ELEMENTS) for tensor in tensors_in(lists[0]))
    tensors = TENSORS_PER_LAUNCH[min(len(lists), len(TENSORS_PER_LAUNCH)) - 1]
    return max(1, math.ceil(chunks / CHUNKS_PER_LAUNCH), math.ceil(len(lists[0]) / tensors))
