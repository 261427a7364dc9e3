"""What is known of CUDA's kernels by an operation's name: what launches one, how many, and what it leaves untouched.

One row, one operation; what stands in no table launches one kernel that reads its arguments and writes its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

ITEM_OPERATION = aten._local_scalar_dense.default
"""`.item()`: the host waits for the card."""
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
ALLOCATION_PREFIXES = ("aten.empty", "aten.new_empty")
"""How the names of operations begin that only take memory."""
FILL_PREFIXES = ("aten.new_", "aten.zeros", "aten.ones", "aten.full", "aten.arange")
"""How those begin that make a tensor of nothing but a shape."""
WRITES_ONLY = frozenset({"aten.copy_.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.zero_.default"})
"""In-place operations that do not read what they overwrite."""
GATHERS = frozenset({"aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor"})
"""Of the first argument, as many bytes are read as are returned."""
SPARSELY_ACCESSED_ARGUMENT: Mapping[str, int] = {
    "aten.nll_loss_forward.default": 0,
    "aten.nll_loss_backward.default": 1,
    "aten.scatter_add_.default": 0,
    "aten.scatter_.src": 0,
}
"""Operation -> the argument of which hardly anything is touched: one element for each index."""
UNWRITTEN_ARGUMENT: Mapping[str, int] = {
    "aten._fused_adamw_.default": 1,
    "aten._fused_adam_.default": 1,
    "bitsandbytes.optimizer_update_32bit.default": 1,
    "bitsandbytes.optimizer_update_8bit_blockwise.default": 1,
}
"""Operation -> the argument that its schema calls written and its kernel leaves: gradients (torch's fused optimizers
write them only where they unscale them, which clipping has done before)."""
KERNELS_PER_OPERATION: Mapping[str, int] = {
    "aten.native_layer_norm_backward.default": 2,
    "aten.embedding_dense_backward.default": 2,
    "aten.nll_loss_backward.default": 2,
    "aten._scaled_dot_product_flash_attention_backward.default": 3,
    "aten._scaled_dot_product_efficient_attention_backward.default": 2,
    "bitsandbytes.gemm_4bit.default": 2,
}
"""Operation -> kernels, where it is not one. Source: the operations' files in aten/src/ATen/native/cuda."""


class KernelInfo(NamedTuple):
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


def _gemm_4bit_flops(states: torch.Tensor, _: Any, shape: Any, *__: Any, out_val: Any = None) -> int:
    rows, columns = shape
    return 2 * (states.numel() // states.shape[-1]) * int(rows) * int(columns)


def _gemm_4bit_bytes(args: tuple[Any, ...]) -> int:
    """The dequantised weight, written and read. Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback`."""
    rows, columns = args[2]
    return 2 * int(rows) * int(columns) * int(args[0].element_size())


INTERNAL_BYTES: Mapping[str, Callable[[tuple[Any, ...]], int]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit_bytes}
"""Operation -> bytes that pass between its own kernels, which the trace cannot see."""
FLOPS_BY_NAME: Mapping[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit_flops}
"""For operations that torch's registry lacks."""


@cache
def kernel_info(func: Any) -> KernelInfo:
    """Returns what an operation's schema and its name say of it."""
    name = str(func)
    written = {
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    } - {UNWRITTEN_ARGUMENT.get(name)}
    launches = not (name in NO_KERNEL or name.startswith(ALLOCATION_PREFIXES) or func.is_view)
    return KernelInfo(
        name=name,
        launches=launches,
        written=frozenset(written),
        fills=name.startswith(FILL_PREFIXES),
        overwritten=name in WRITES_ONLY,
        flops=FLOPS_BY_NAME.get(name) or flop_registry.get(func.overloadpacket),
        is_multi="foreach" in name or "_fused_a" in name,
    )
