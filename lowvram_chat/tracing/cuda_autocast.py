"""Autocast's lists of CUDA, for a trace that runs on the CPU.

The lists differ: on CUDA layer_norm, softmax, pow and others run in fp32, on the CPU they follow their input. While
`cuda_autocast` is open, kernels registered under the CPU's autocast key do what CUDA's do; matrix products are on both
lists, and the cache of fp16 weight copies is torch's own.

Source: aten/src/ATen/autocast_mode.h, `AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

FP32_OPERATIONS = (
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    aten.exp.default,
    aten.expm1.default,
    aten.log.default,
    aten.log1p.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.softplus.default,
    aten.logsumexp.default,
    aten.nll_loss.default,
    aten.nll_loss_nd.default,
    aten.cross_entropy_loss.default,
    aten.norm.Scalar,
    aten.linalg_vector_norm.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.cumsum.default,
    aten.prod.default,
    aten.prod.dim_int,
)
"""Cast to fp32 on CUDA, of those that language models use; what is on the CPU's list too is left to it."""


def autocast_type() -> torch.dtype | None:
    """The compute type of the autocast that is in force, or None."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Registers CUDA's fp32 list under the CPU's autocast key; leaving takes it back."""
    library: Any = torch.library.Library("aten", "IMPL", "AutocastCPU")
    try:
        for operation in FP32_OPERATIONS:
            _register(library, operation, _in_fp32(operation))
        _register(library, aten.softmax.int, _softmax(aten.softmax.int, aten._softmax.default))
        _register(library, aten.log_softmax.int, _softmax(aten.log_softmax.int, aten._log_softmax.default))
        yield
    finally:
        library._destroy()


def _register(library: Any, operation: Any, kernel: Callable[..., Any]) -> None:
    """Adds a kernel where the CPU's own autocast has none (`nll_loss` is on both lists)."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "AutocastCPU"):
        library.impl(operation, kernel)


def _below_autocast() -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _to_fp32(value: Any) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    return tree_map_only(torch.Tensor, cast, value)


def _in_fp32(operation: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return operation(*_to_fp32(args), **_to_fp32(kwargs))

    return kernel


def _softmax(operation: Any, fused: Any) -> Callable[..., Any]:
    """CUDA's softmax reads fp16 and writes fp32 in one kernel, where the CPU would copy its input first."""

    def kernel(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        with _below_autocast():
            if tensor.dtype == torch.float16 and dtype in (None, torch.float32):
                return fused(tensor, dim, True)
            return operation(tensor, dim, dtype=dtype or torch.float32)

    return kernel
