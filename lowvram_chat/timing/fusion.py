"""Predicts what `torch.compile` makes of a list of operations: matrix products stay, and everything between is fused.

`torch.compile` fuses pointwise operations, casts, softmax and norms. Consecutive operations without matrix products
therefore form one group, which becomes one kernel:

- A tensor that is both created and used up inside the group costs nothing.
- A tensor that several of its operations read is read once.
- A result that later groups read, but no matrix product, can be recomputed from the group's inputs (the recomputation of
  the partitioner). It is recomputed where that moves fewer bytes.
- A matrix whose rows are not aligned is copied once into one whose rows are.

Source: torch/_inductor/scheduler.py; torch/_functorch/partitioners.py, `min_cut_rematerialization_partition`;
torch/_inductor/fx_passes/pad_mm.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lowvram_chat.tracing.operations import Access, BytesByStorage, Operation

COMPILED_PHASES = frozenset({"forward", "loss", "backward"})
"""Phases that are compiled. Clipping and the optimizer's step are outside the model and stay as they are."""


def fuse(parts: Sequence[Sequence[Operation]], *, pads: bool = True) -> list[list[Operation]]:
    """Return the operations of a step whose model is compiled, given those of the same step without compilation.

    `pads` tells whether the compiler pads matrices, as PyTorch's does since 2.2.
    """
    fused = [_compiled(part) for part in parts]
    return [list(_padded(part)) for part in fused] if pads else fused


def _padded(part: Sequence[Operation]) -> Iterator[Operation]:
    """Yield the operations with aligned matrix products, each unaligned matrix copied before its first use."""
    copied: set[object] = set()
    for operation in part:
        if not operation.unaligned or operation.phase not in COMPILED_PHASES:
            yield operation
            continue
        read = {access.storage for access in operation.reads}
        for storage, nbytes in operation.unaligned:
            if storage in read and storage not in copied:
                copied.add(storage)
                yield _kernel("pad", operation.phase, {storage: nbytes}, {object(): nbytes})
        yield operation._replace(unaligned=())


@dataclass(frozen=True)
class _StorageUse:
    """How the operations of one part of a step use storages."""

    read_counts: Counter[object]
    """Storage -> number of operations that read it."""
    read_by_products: frozenset[object]
    """Storages that an operation outside all groups reads, such as a matrix product."""
    recomputed: dict[object, BytesByStorage] = field(default_factory=dict)
    """Storage that is not kept -> what it is recomputed from; filled as the groups are fused."""


def _compiled(part: Sequence[Operation]) -> list[Operation]:
    """Return the operations with each group as one kernel."""
    use = _StorageUse(
        read_counts=Counter(access.storage for operation in part for access in operation.reads),
        read_by_products=frozenset(
            access.storage for operation in part if _stands_alone(operation) for access in operation.reads
        ),
    )
    return [group[0] if _stands_alone(group[0]) else _fused(group, use) for group in _groups(part)]


def _groups(part: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Yield the groups, and each operation between them as a group of its own."""
    group: list[Operation] = []
    for operation in part:
        if _stands_alone(operation):
            if group:
                yield group
            yield [operation]
            group = []
        else:
            group.append(operation)
    if group:
        yield group


def _stands_alone(operation: Operation) -> bool:
    """Return whether an operation cannot be fused with its neighbours."""
    return operation.flops > 0 or operation.synchronizes or operation.phase not in COMPILED_PHASES


def _fused(group: Sequence[Operation], use: _StorageUse) -> Operation:
    """Return one kernel for a group, without the results that are cheaper to recompute."""
    reads, writes = _external_accesses(group, use.read_counts)
    for storage, sources in use.recomputed.items():
        if storage in reads:
            del reads[storage]
            reads |= {source: max(nbytes, reads.get(source, 0)) for source, nbytes in sources.items()}
    recomputation_bytes = sum(reads.values())
    for storage, nbytes in list(writes.items()):
        is_needed_by_groups = storage not in use.read_by_products and use.read_counts[storage]
        if is_needed_by_groups and recomputation_bytes <= nbytes:
            del writes[storage]
            use.recomputed[storage] = dict(reads)
    return _kernel("fused", group[-1].phase, reads, writes)


def _kernel(name: str, phase: str, reads: BytesByStorage, writes: BytesByStorage) -> Operation:
    """Return one kernel without matrix products."""
    return Operation(
        name=name,
        phase=phase,
        flops=0,
        precision="none",
        unaligned=(),
        reads=tuple(Access(*item) for item in reads.items()),
        writes=tuple(Access(*item) for item in writes.items()),
        launches=1,
        synchronizes=False,
    )


def _external_accesses(
    group: Sequence[Operation], read_counts: Mapping[object, int]
) -> tuple[BytesByStorage, BytesByStorage]:
    """Return what a group reads that it has not written before, and what it writes that is read outside the group."""
    reads: BytesByStorage = {}
    writes: BytesByStorage = {}
    reads_inside: Counter[object] = Counter()
    for operation in group:
        for storage, nbytes in operation.reads:
            reads_inside[storage] += 1
            if storage not in writes:
                reads[storage] = max(nbytes, reads.get(storage, 0))
        for storage, nbytes in operation.writes:
            writes[storage] = max(nbytes, writes.get(storage, 0))
    used_up = {
        storage for storage in writes if storage not in reads and 0 < reads_inside[storage] == read_counts[storage]
    }
    return reads, {storage: nbytes for storage, nbytes in writes.items() if storage not in used_up}
