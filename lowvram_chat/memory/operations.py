"""What a traced operation asks of a card: products, bytes read and written, kernels launched, and in what precision.

The recorder (`trace`) calls `Describer.describe` for each operation while it is told to list them. Views, allocations and
questions about a tensor launch nothing and are left out. Bytes are those of the tensors' own elements: what is expanded
counts once, a gather reads what it returns. FLOPs are those of `torch.utils.flop_counter`, which is the convention of
published utilisations: a multiply-add is two, and causal attention counts in full although flash kernels skip the upper
half (so their share of the peak, lower than a plain product's, is hidden in the half that they skip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Precision = Literal["half", "single", "none"]
"""Of an operation's products: fp16 or bf16, fp32 (TF32 where it is allowed), or no products at all."""


Moved = dict[object, int]
"""Storage -> bytes."""
StorageOf = Callable[[torch.Tensor], object]


class Piece(NamedTuple):
    """Elements of one storage that an operation reads or writes."""

    storage: object
    nbytes: int


class Operation(NamedTuple):
    """One traced operation that launches kernels."""

    name: str
    moment: str
    flops: int
    precision: Precision
    unaligned: tuple[Piece, ...]
    """Those of its product's matrices whose rows do not all begin at multiples of `ALIGNMENT_BYTES`."""
    reads: tuple[Piece, ...]
    writes: tuple[Piece, ...]
    launches: int
    waits: bool
    """Whether the host waits for its result, as `.item()` does."""

    @property
    def nbytes(self) -> int:
        """Bytes that pass between the card's memory and its processors."""
        return sum(piece.nbytes for piece in self.reads) + sum(piece.nbytes for piece in self.writes)


ALIGNMENT_BYTES = 16
"""Tensor-core kernels load this much at a time. Source: NVIDIA, Matrix Multiplication Background User's Guide, section
"Tensor Core Requirements": dimensions that are multiples of 16 bytes."""
HALF_TYPES = frozenset({torch.float16, torch.bfloat16})
WAIT = aten._local_scalar_dense.default
NO_KERNEL = frozenset(
    {
        "aten.detach.default",
        "aten.alias.default",
        "aten._unsafe_view.default",
        "aten._reshape_alias.default",
        "aten.lift_fresh.default",
        "aten.is_same_size.default",
        "aten.set_.source_Storage",
        "prim.device.default",
        "profiler._record_function_enter_new.default",
        "profiler._record_function_exit._RecordFunction",
    }
)
ALLOCATIONS = ("aten.empty", "aten.new_empty")
FILLS = ("aten.new_", "aten.zeros", "aten.ones", "aten.full", "aten.arange")
WRITES_ONLY = frozenset({"aten.copy_.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.zero_.default"})
"""In-place operations that do not read what they overwrite."""
GATHERS = frozenset({"aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor"})
"""Of the first argument, as many bytes are read as are returned."""
TOUCHES_FEW: Mapping[str, int] = {
    "aten.nll_loss_forward.default": 0,
    "aten.nll_loss_backward.default": 1,
    "aten.scatter_add_.default": 0,
}
"""Operation -> the argument of which hardly anything is touched: one element for each index."""
UNWRITTEN: Mapping[str, int] = {
    "aten._fused_adamw_.default": 1,
    "aten._fused_adam_.default": 1,
    "bitsandbytes.optimizer_update_32bit.default": 1,
    "bitsandbytes.optimizer_update_8bit_blockwise.default": 1,
}
"""Operation -> the argument that its schema calls written and its kernel leaves: gradients (torch's fused optimizers
write them only where they unscale them, which clipping has done before)."""
KERNELS: Mapping[str, int] = {
    "aten.native_layer_norm_backward.default": 2,
    "aten.embedding_dense_backward.default": 2,
    "aten.nll_loss_backward.default": 2,
    "aten._scaled_dot_product_flash_attention_backward.default": 3,
    "aten._scaled_dot_product_efficient_attention_backward.default": 2,
    "bitsandbytes.gemm_4bit.default": 2,
}
"""Operation -> kernels, where it is not one. Source: the operations' files in aten/src/ATen/native/cuda."""
CHUNK, CHUNKS_OF_LAUNCH, TENSORS_OF_LAUNCH = 65536, 320, (110, 64, 48, 36, 30)
"""Elements of a chunk; chunks of a launch; tensors of a launch over one to five lists.
Source: aten/src/ATen/native/cuda/MultiTensorApply.cuh, `kChunkSize`, `depth_to_max_blocks`, `depth_to_max_tensors`."""


class Kind(NamedTuple):
    """What can be said of an operation before its tensors are seen."""

    name: str
    launches: bool
    written: frozenset[int]
    """Places of the arguments that it writes into."""
    fills: bool
    """Whether it makes a tensor of nothing but a shape."""
    overwritten: bool
    """Whether it does so without reading them."""
    flops: Callable[..., int] | None
    is_multi: bool
    """Whether it runs over lists of tensors, a few kernels for all."""


@cache
def kind_of(func: Any) -> Kind:
    """Returns what an operation's schema and its name say of it."""
    name = str(func)
    written = {
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    } - {UNWRITTEN.get(name)}
    launches = not (name in NO_KERNEL or name.startswith(ALLOCATIONS) or func.is_view)
    return Kind(
        name=name,
        launches=launches,
        written=frozenset(written),
        fills=name.startswith(FILLS),
        overwritten=name in WRITES_ONLY,
        flops=FLOPS_BY_NAME.get(name) or flop_registry.get(func.overloadpacket),
        is_multi="foreach" in name or "_fused_a" in name,
    )


def describe(func: Any, args: tuple[Any, ...], result: Any, moment: str, storage_of: StorageOf) -> Operation | None:
    """Returns what an operation asks of the card; None where it launches nothing.

    `storage_of` gives what stands for a tensor's storage: the same object for the same storage, and no other's.
    """
    kind = kind_of(func)
    if not kind.launches:
        return None
    reads, writes = _moved(kind, args, result, storage_of)
    matrices = [tensor for tensor in _tensors(args[:3]) if tensor.dim() > 1] if kind.flops else []
    products = [*matrices, *_tensors(result)] if kind.flops else []
    return Operation(
        name=kind.name,
        moment=moment,
        flops=kind.flops(*args, out_val=result) if kind.flops else 0,
        precision=_precision(matrices),
        unaligned=tuple(Piece(storage_of(one), _bytes(one)) for one in products if not _is_aligned(one)),
        reads=tuple(Piece(*item) for item in reads.items()),
        writes=tuple(Piece(*item) for item in writes.items()),
        launches=_multi_launches(args) if kind.is_multi else KERNELS.get(kind.name, 1),
        waits=func is WAIT,
    )


def _moved(kind: Kind, args: tuple[Any, ...], result: Any, storage_of: StorageOf) -> tuple[Moved, Moved]:
    """What an operation reads and what it writes."""
    reads: Moved = {}
    writes: Moved = {}
    for place, argument in enumerate(() if kind.fills else args):
        is_written = place in kind.written
        for tensor in _tensors(argument):
            if is_written:
                _add(writes, storage_of(tensor), _bytes(tensor))
            if not (is_written and kind.overwritten):
                _add(reads, storage_of(tensor), _bytes(tensor))
    if kind.name in GATHERS:
        reads[storage_of(args[0])] = _bytes(result)
    if kind.name in TOUCHES_FEW:
        table = storage_of(args[TOUCHES_FEW[kind.name]])
        for pieces in (reads, writes):
            pieces.update(dict.fromkeys(pieces.keys() & {table}, 0))
    for tensor in _tensors(result):
        if storage_of(tensor) not in reads.keys() | writes.keys():
            writes[storage_of(tensor)] = _bytes(tensor)
    if kind.name in HIDDEN_BYTES:
        writes[object()] = HIDDEN_BYTES[kind.name](args)
    return reads, writes


def _add(pieces: Moved, storage: object, nbytes: int) -> None:
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
    chunks = sum(math.ceil(tensor.numel() / CHUNK) for tensor in _tensors(lists[0]))
    tensors = TENSORS_OF_LAUNCH[min(len(lists), len(TENSORS_OF_LAUNCH)) - 1]
    return max(1, math.ceil(chunks / CHUNKS_OF_LAUNCH), math.ceil(len(lists[0]) / tensors))


def _gemm_4bit_flops(states: torch.Tensor, _: Any, shape: Any, *__: Any, out_val: Any = None) -> int:
    rows, columns = shape
    return 2 * (states.numel() // states.shape[-1]) * int(rows) * int(columns)


def _gemm_4bit_bytes(args: tuple[Any, ...]) -> int:
    """The dequantised weight, written and read. Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback`."""
    rows, columns = args[2]
    return 2 * int(rows) * int(columns) * int(args[0].element_size())


HIDDEN_BYTES: Mapping[str, Callable[[tuple[Any, ...]], int]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit_bytes}
"""Operation -> bytes that pass between its own kernels, which the trace cannot see."""
FLOPS_BY_NAME: Mapping[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit_flops}
"""For operations that torch's registry lacks."""
