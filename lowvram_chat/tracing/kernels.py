"""Facts about CUDA's kernels that follow from an operation's name: how many it launches, and what they read and write.

Each row describes one operation. An operation in no table launches one kernel, which reads the arguments and writes the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Operator

check_private_names(
    "torch.ops.aten._fused_adam_.default",
    "torch.ops.aten._fused_adamw_.default",
    "torch.ops.aten._local_scalar_dense.default",
    "torch.ops.aten._local_scalar_dense.default._schema",
    "torch.ops.aten._reshape_alias.default",
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward.default",
    "torch.ops.aten._scaled_dot_product_flash_attention.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward.default",
    "torch.ops.aten._unsafe_view.default",
    "torch.ops.profiler._record_function_enter_new.default",
    "torch.ops.profiler._record_function_exit._RecordFunction",
)

aten = torch.ops.aten

ITEM_OPERATION = aten._local_scalar_dense.default
"""`.item()`: the host waits for the device."""
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
"""Operations that launch no kernel, besides views and allocations."""
ALLOCATION_PREFIXES = ("aten.empty", "aten.new_empty")
"""Prefixes of the names of operations that only allocate memory."""
FILL_PREFIXES = ("aten.new_", "aten.zeros", "aten.ones", "aten.full", "aten.arange")
"""Prefixes of the names of operations that create a tensor from a shape alone."""
WRITES_ONLY = frozenset({"aten.copy_.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.zero_.default"})
"""In-place operations that do not read what they overwrite."""
GATHERS = frozenset({"aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor"})
"""Operations that read as many bytes of their first argument as they return."""
SPARSELY_ACCESSED_ARGUMENT: Mapping[str, int] = {
    "aten.nll_loss_forward.default": 0,
    "aten.nll_loss_backward.default": 1,
    "aten.scatter_add_.default": 0,
    "aten.scatter_.src": 0,
}
"""Operation -> position of the sparsely accessed argument: one element is accessed for each index."""
UNWRITTEN_ARGUMENT: Mapping[str, int] = {
    "aten._fused_adamw_.default": 1,
    "aten._fused_adam_.default": 1,
    "bitsandbytes.optimizer_update_32bit.default": 1,
    "bitsandbytes.optimizer_update_8bit_blockwise.default": 1,
}
"""Operation -> position of an argument that its schema declares as written but its kernel does not write: the gradients.
PyTorch's fused optimizers write gradients only when they unscale them, and clipping has done that before."""
KERNELS_PER_OPERATION: Mapping[str, int] = {
    "aten.native_layer_norm_backward.default": 2,
    "aten.embedding_dense_backward.default": 2,
    "aten.nll_loss_backward.default": 2,
    "aten._scaled_dot_product_flash_attention_backward.default": 3,
    "aten._scaled_dot_product_efficient_attention_backward.default": 2,
    "bitsandbytes.gemm_4bit.default": 2,
    "torch_attn._varlen_attn.default": 2,
    "torch_attn._varlen_attn_backward.default": 3,
}
"""Operation -> number of kernels, where it is not one. Source: the operations' files in aten/src/ATen/native/cuda."""


class KernelInfo(NamedTuple):
    """What is known of an operation without its tensors."""

    name: str
    launches: bool
    """Whether it launches a kernel."""
    written: frozenset[int]
    """Positions of the arguments that it writes into."""
    fills: bool
    """Whether it creates a tensor from a shape alone."""
    overwrites: bool
    """Whether it writes into its arguments without reading them."""
    flops: Callable[..., int] | None
    """Computes FLOPs from the arguments and `out_val`, the result; None for operations without matrix products."""
    is_multi_tensor: bool
    """Whether it runs over lists of tensors, with a few kernels for all of them."""


def _gemm_4bit_flops(states: torch.Tensor, _: object, shape: Sequence[int], *__: object, out_val: object = None) -> int:
    """FLOPs of the product with the dequantised (out, in) weight."""
    rows, columns = shape
    return 2 * (states.numel() // states.shape[-1]) * int(rows) * int(columns)


def _gemm_4bit_bytes(states: torch.Tensor, _: object, shape: Sequence[int], *__: object) -> int:
    """The dequantised weight, written and read. Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback`."""
    rows, columns = shape
    return 2 * int(rows) * int(columns) * states.element_size()


INTERNAL_BYTES: Mapping[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit_bytes}
"""Operation -> bytes that its own kernels exchange, which the trace cannot see."""


def _varlen_flops(query: torch.Tensor, *arguments: object, out_val: object = None) -> int:
    """FLOPs of attention over documents, if each row (T tokens, the longest length that is given) holds two of one length.

    PyTorch's registry would count every document as one of the longest length.
    """
    longest = arguments[4]
    assert isinstance(longest, int)
    return 2 * query.numel() * longest  # two products of T / 2 multiply-adds for each element


def _varlen_backward_flops(
    gradient: torch.Tensor, query: torch.Tensor, *arguments: object, out_val: object = None
) -> int:
    """FLOPs of the backward pass: five products where the forward pass has two, as in PyTorch's registry."""
    longest = arguments[6]
    assert isinstance(longest, int)
    return 5 * query.numel() * longest


def _in_place_product_flops(_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **__: object) -> int:
    """FLOPs of a product (M, K) x (K, N), or of a batch of them, that is added to its first argument."""
    return 2 * left.numel() * right.shape[-1]


FLOPS_BY_NAME: Mapping[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
    "aten.addmm_.default": _in_place_product_flops,
    "aten.baddbmm_.default": _in_place_product_flops,
    "bitsandbytes.gemm_4bit.default": _gemm_4bit_flops,
    "torch_attn._varlen_attn.default": _varlen_flops,
    "torch_attn._varlen_attn_backward.default": _varlen_backward_flops,
}
"""Operation -> FLOPs, where PyTorch's registry has no entry or another meaning."""


@cache
def kernel_info(func: Operator) -> KernelInfo:
    """Return what an operation's schema and name tell about its kernels."""
    name = str(func)
    written = {
        position
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    } - {UNWRITTEN_ARGUMENT.get(name)}
    return KernelInfo(
        name=name,
        launches=not (name in NO_KERNEL or name.startswith(ALLOCATION_PREFIXES) or func.is_view),
        written=frozenset(written),
        fills=name.startswith(FILL_PREFIXES),
        overwrites=name in WRITES_ONLY,
        flops=FLOPS_BY_NAME.get(name) or flop_registry.get(func.overloadpacket),
        is_multi_tensor="foreach" in name or "_fused_a" in name,
    )
