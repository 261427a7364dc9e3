"""Applies CUDA's autocast lists to a trace that runs on the CPU.

The two lists differ. On CUDA, layer_norm, softmax, pow and others run in fp32; on the CPU they keep the type of their
input. While `cuda_autocast` is open, kernels registered under the CPU's autocast key do what CUDA's do. Matrix products
are on both lists, and the cache of fp16 weight copies is PyTorch's own.

Source: aten/src/ATen/autocast_mode.h, `AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Operator
from lowvram_chat.tracing.patching import patched

check_private_names(
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch.library.Library._destroy",
    "torch.ops.aten._log_softmax.default",
    "torch.ops.aten._softmax.default",
)

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
"""Operations of language models that CUDA's autocast casts to fp32. Operations on the CPU's own list are skipped."""


IS_AUTOCAST_ENABLED = torch.is_autocast_enabled


def is_autocast_enabled(device_type: str = "cpu") -> bool:
    """Return `torch.is_autocast_enabled` of the traced device, where a library asks for no device and means CUDA.

    PEFT casts the inputs of adapters on 4-bit layers unless autocast is on.
    """
    return IS_AUTOCAST_ENABLED(device_type)


def autocast_type() -> torch.dtype | None:
    """Return the compute type of the active autocast, or None."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Register CUDA's fp32 list under the CPU's autocast key, and remove it on exit."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    answers = patched(torch, is_autocast_enabled=is_autocast_enabled)
    try:
        for operation in FP32_OPERATIONS:
            _register(library, operation, _in_fp32(operation))
        _register(library, aten.softmax.int, _softmax(aten.softmax.int, aten._softmax.default))
        _register(library, aten.log_softmax.int, _softmax(aten.log_softmax.int, aten._log_softmax.default))
        with answers:
            yield
    finally:
        library._destroy()


def _register(library: torch.library.Library, operation: Operator, kernel: Callable[..., object]) -> None:
    """Register a kernel unless the CPU's autocast has its own (`nll_loss` is on both lists)."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "AutocastCPU"):
        library.impl(operation, kernel)


def _below_autocast() -> contextlib.AbstractContextManager[None]:
    """Return a context in which the dispatcher skips the CPU's autocast key."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _to_fp32(value: object) -> object:
    """Return a half-precision tensor as fp32, and anything else unchanged."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _in_fp32(operation: Operator) -> Callable[..., object]:
    """Return a kernel that casts its tensors to fp32 first."""

    def kernel(*args: object, **kwargs: object) -> object:
        with _below_autocast():
            return operation(*map(_to_fp32, args), **{name: _to_fp32(value) for name, value in kwargs.items()})

    return kernel


def _softmax(operation: Operator, fused: Operator) -> Callable[..., object]:
    """Return a kernel that, like CUDA's, reads fp16 and writes fp32; the CPU's would copy its input first."""

    def kernel(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> object:
        with _below_autocast():
            if tensor.dtype == torch.float16 and dtype in (None, torch.float32):
                return fused(tensor, dim, True)
            return operation(tensor, dim, dtype=dtype or torch.float32)

    return kernel
