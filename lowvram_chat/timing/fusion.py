"""What a compiler leaves of a list of operations: products as they are, all between two of them as one kernel.

`torch.compile` fuses pointwise operations, casts, softmax and norms. So consecutive operations without products are one
group: what is made and used up inside it costs nothing, and what several of its operations read is read once. A group's
result that later ones need, but no product does, may be made anew from the group's own inputs (the partitioner's
recomputation); it is where that moves fewer bytes. A matrix whose rows are not aligned is copied once into one whose are.
Source: torch/_inductor/scheduler.py; torch/_functorch/partitioners.py, `min_cut_rematerialization_partition`;
torch/_inductor/fx_passes/pad_mm.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lowvram_chat.tracing.operations import Access, Operation

COMPILED_PHASES = frozenset({"forward", "loss", "backward"})
"""The optimizer's step and the clipping stay as they are: they are outside the model."""
Reads = dict[object, int]


def fuse(parts: Sequence[Sequence[Operation]], *, pads: bool = True) -> list[list[Operation]]:
    """Returns the operations of a step whose model is compiled, from those of one whose model is not.

    `pads`: whether the compiler pads matrices, as torch's does from 2.2 on.
    """
    fused = [_compiled(part) for part in parts]
    return [list(_padded(part)) for part in fused] if pads else fused


def _padded(part: Sequence[Operation]) -> Iterator[Operation]:
    """The operations with every product aligned, after a copy of each matrix that was not."""
    copied: set[object] = set()
    for operation in part:
        if operation.unaligned and operation.phase in COMPILED_PHASES:
            read = {piece.storage for piece in operation.reads}
            for piece in operation.unaligned:
                if piece.storage in read and piece.storage not in copied:
                    copied.add(piece.storage)
                    yield _kernel("pad", operation.phase, {piece.storage: piece.nbytes}, {object(): piece.nbytes})
            yield operation._replace(unaligned=())
        else:
            yield operation


def _compiled(part: Sequence[Operation]) -> list[Operation]:
    groups = list(_groups(part))
    needed = Counter(piece.storage for group in groups for op in group for piece in op.reads)
    by_products = {piece.storage for op in part if _stands_alone(op) for piece in op.reads}
    made_in_part = {piece.storage for op in part for piece in op.writes}
    made_anew: dict[object, Reads] = {}
    return [_fused(group, needed, by_products, made_in_part, made_anew) for group in groups]


def _groups(part: Sequence[Operation]) -> Iterator[list[Operation]]:
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
    return operation.flops > 0 or operation.waits or operation.phase not in COMPILED_PHASES


def _fused(
    group: Sequence[Operation],
    needed: Mapping[object, int],
    by_products: set[object],
    made_in_part: set[object],
    made_anew: dict[object, Reads],
) -> Operation:
    """One kernel for a group; `made_anew` tells of each result that is not kept what it is made from."""
    if _stands_alone(group[0]):
        return group[0]
    reads, writes = _outside(group, needed, made_in_part)
    for storage, sources in made_anew.items():
        if storage in reads:
            del reads[storage]
            reads |= {source: max(nbytes, reads.get(source, 0)) for source, nbytes in sources.items()}
    cost = sum(reads.values())
    for storage, nbytes in list(writes.items()):
        if storage in made_in_part and storage not in by_products and needed[storage] and cost <= nbytes:
            del writes[storage]
            made_anew[storage] = dict(reads)
    return _kernel("fused", group[-1].phase, reads, writes)


def _kernel(name: str, moment: str, reads: Reads, writes: Reads) -> Operation:
    """A kernel without products."""
    return Operation(
        name=name,
        phase=moment,
        flops=0,
        precision="none",
        unaligned=(),
        reads=tuple(Access(*item) for item in reads.items()),
        writes=tuple(Access(*item) for item in writes.items()),
        launches=1,
        waits=False,
    )


def _outside(
    group: Sequence[Operation], needed: Mapping[object, int], made_in_part: set[object]
) -> tuple[Reads, Reads]:
    """What a group reads that it has not made, and what it writes that outlives it."""
    reads: Reads = {}
    writes: Reads = {}
    inside: Counter[object] = Counter()
    for operation in group:
        for storage, nbytes in operation.reads:
            inside[storage] += 1
            if storage not in writes:
                reads[storage] = max(nbytes, reads.get(storage, 0))
        for storage, nbytes in operation.writes:
            writes[storage] = max(nbytes, writes.get(storage, 0))
    used_up = {storage for storage in writes if storage not in reads and 0 < inside[storage] == needed[storage]}
    return reads, {storage: nbytes for storage, nbytes in writes.items() if storage not in used_up}
