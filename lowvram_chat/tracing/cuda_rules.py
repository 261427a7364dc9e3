"""How a CUDA device differs from the fake CPU of the trace. Each difference is described in one place.

- `cuda_attention`: which kernel `scaled_dot_product_attention` selects, and therefore what it saves and allocates.
- `cuda_dropout`: the fused kernel, which keeps a mask of one byte for each element.
- `cuda_log_softmax`: fp16 logits are not copied to fp32 first.
- `cuda_foreach_default`: PyTorch's optimizers and `clip_grad_norm_` select their foreach implementations.
- `cuda_buffers` (its own file): memory that a kernel allocates internally, where the trace cannot see it.
- `cuda_autocast` (its own file): operations that autocast casts to fp32 on CUDA but not on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils import _foreach_utils

from lowvram_chat.model.flash_attention import FLASH_CAPABILITY, MAX_FLASH_WIDTH, why_no_varlen
from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.cuda_autocast import autocast_type, cuda_autocast
from lowvram_chat.tracing.cuda_buffers import BUFFER_BEFORE_RESULT, temporary_buffers
from lowvram_chat.tracing.cuda_reductions import (
    PROCESSORS,
    Grid,
    reduction_buffers,
    threads_per_processor,
)
from lowvram_chat.tracing.dispatch import Arguments, Operator, tensor_at
from lowvram_chat.tracing.operations import ALIGNMENT_BYTES, HALF_TYPES
from lowvram_chat.tracing.patching import patched
from lowvram_chat.tracing.rules import DeviceRules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lowvram_chat.recipe.schema import Recipe

check_private_names(
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch.ops.aten._log_softmax.default",
    "torch.ops.aten._scaled_dot_product_attention_math.default",
    "torch.ops.aten._scaled_dot_product_efficient_attention.default",
    "torch.ops.aten._scaled_dot_product_flash_attention.default",
    "torch.optim.optimizer._foreach_supported_types",
    "torch.optim.optimizer._get_foreach_kernels_supported_devices",
    "torch.utils._foreach_utils._foreach_supported_types",
    "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
)

aten = torch.ops.aten

CUBLASLT_WORKSPACE_BYTES = 1 << 20
"""What cuBLASLt took for each product with a bias row, before torch let it share the workspace of cuBLAS."""
MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})


class CudaRules(DeviceRules):
    """A CUDA device of the given compute capability.

    Each of two threads allocates `cublas_workspace_bytes` once, at its first matrix product: the main thread in the
    forward pass, and autograd's thread in the backward pass. cuBLAS takes 8.125 MiB below compute capability 9.0, 32 MiB
    from there on, and 0 where CUBLAS_WORKSPACE_CONFIG is `:0:0`. cuBLASLt shares that workspace in the torch versions that
    this package runs with; in older ones a product with a bias row takes `cublaslt_workspace_bytes` of its own (torch 2.6:
    1 MiB).
    `processors` is the number of multiprocessors: sums over many rows are split among them. `has_flash`: torch's build has
    FlashAttention.
    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`; CUDABlas.cpp, `CublasLtWorkspace`
    (TORCH_CUBLASLT_UNIFIED_WORKSPACE).
    """

    def __init__(
        self,
        compute_capability: tuple[int, int] = (8, 6),
        *,
        cublas_workspace_bytes: int = 0,
        cublaslt_workspace_bytes: int = 0,
        processors: int = PROCESSORS,
        has_flash: bool = True,
        plain_rows: bool = False,
    ) -> None:
        super().__init__(plain_rows=plain_rows)
        self.compute_capability = compute_capability
        self.cublas_workspace_bytes = cublas_workspace_bytes
        self.cublaslt_workspace_bytes = cublaslt_workspace_bytes
        self.has_flash = has_flash
        self.grid = Grid(processors, threads_per_processor(compute_capability))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put every substitution of this file in force."""
        has_flash = self.has_flash and self.compute_capability >= FLASH_CAPABILITY
        with super().active(), cuda_foreach_default(), cuda_autocast(), cuda_functions(has_flash=has_flash):
            yield

    def has_varlen_attention(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Return whether packed rows of this recipe have attention by document on this card."""
        return why_no_varlen(recipe, config, self.compute_capability, has_flash=self.has_flash) is None

    def temporaries(self, func: Operator, args: Arguments, result: object) -> Iterable[int]:
        """Return the sizes, in bytes, of the buffers inside an operation's CUDA kernel."""
        if func is aten.addmm.default and self.cublaslt_workspace_bytes and tensor_at(args, 0).dim() == 1:
            return [self.cublaslt_workspace_bytes]
        return temporary_buffers(func, args) or reduction_buffers(func, args, self.grid)

    def has_buffers_first(self, func: Operator) -> bool:
        """Return whether an operation allocates its buffers before its results."""
        return str(func) in BUFFER_BEFORE_RESULT

    def workspace(self, func: Operator) -> int:
        """Return the bytes that a thread's first matrix product allocates and never frees."""
        return self.cublas_workspace_bytes if func in MATRIX_PRODUCTS else 0

    def allocation_order(self, func: Operator, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the results of an operation in the order in which its CUDA kernel allocates them.

        Dropout allocates its mask first. Source: aten/src/ATen/native/cuda/Dropout.cu, `dropout_cuda`.
        """
        return tensors[::-1] if func is aten.native_dropout.default else tensors


def cuda_functions(*, has_flash: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the functions of `torch.nn.functional` behave as on CUDA."""
    return patched(
        functional,
        dropout=cuda_dropout,
        log_softmax=cuda_log_softmax,
        scaled_dot_product_attention=partial(cuda_attention, has_flash=has_flash),
    )


def cuda_log_softmax(
    input: torch.Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Log-softmax as on CUDA: fp16 that is to become fp32 is cast while it is read, not copied first.

    Source: aten/src/ATen/native/SoftMax.cpp, `log_softmax`.
    """
    if input.dtype == torch.float16 and dtype == torch.float32:
        result: torch.Tensor = aten._log_softmax(input, dim, True)
        return result
    return input.log_softmax(dim, dtype=dtype)


def cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout as on CUDA: one kernel that returns the result and a mask of booleans.

    Source: aten/src/ATen/native/Dropout.cpp, `is_fused_kernel_acceptable`.
    """
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)


def cuda_attention(  # noqa: PLR0917  (the signature of the function it replaces)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    has_flash: bool,
) -> torch.Tensor:
    """Attention (B, H, T, D) by the kernel that CUDA selects: flash, else memory-efficient, else plain arithmetic.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `select_sdp_backend` (cuDNN is not tried before 9.0).
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    mask = None if attn_mask is None else _bias(attn_mask, query)
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    results: tuple[torch.Tensor, ...]
    if mask is None and has_flash and _suits_flash(query):
        results = aten._scaled_dot_product_flash_attention(query, key, value, **options)
        return results[0]
    if enable_gqa:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
    if query.shape[-1] * query.element_size() % ALIGNMENT_BYTES == 0:  # the memory-efficient kernel needs this
        saves = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        results = aten._scaled_dot_product_efficient_attention(query, key, value, mask, saves, **options)
    else:
        results = aten._scaled_dot_product_attention_math(query, key, value, mask, **options)
    return results[0]


def _suits_flash(query: torch.Tensor) -> bool:
    """Return whether FlashAttention takes such queries."""
    return query.dtype in HALF_TYPES and query.shape[-1] <= MAX_FLASH_WIDTH


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a floating-point tensor in the type of the active autocast, and any other unchanged."""
    dtype = autocast_type()
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return the mask as the kernel takes it: added to the scores, of the compute type, rows padded, expanded (a view).

    Source: aten/src/ATen/native/transformers/attention.cpp, `convert_boolean_attn_mask`, `preprocess_mask`.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    mask = _autocast(mask)
    padding = -mask.shape[-1] % 8
    if padding:
        mask = functional.pad(mask, (0, padding))[..., :-padding]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], -1)


@contextlib.contextmanager
def cuda_foreach_default() -> Iterator[None]:
    """Let torch.optim and gradient clipping choose foreach on the fake CPU, as they do on CUDA.

    Source: torch/optim/optimizer.py, `_default_to_fused_or_foreach`; torch/utils/_foreach_utils.py.
    """
    optimizer = importlib.import_module("torch.optim.optimizer")  # the package torch.optim deletes the attribute
    supported_devices = _foreach_utils._get_foreach_kernels_supported_devices

    def with_cpu() -> list[str]:
        return [*supported_devices(), "cpu"]

    with contextlib.ExitStack() as exits:
        for types in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
            types.append(FakeTensor)
            exits.callback(types.remove, FakeTensor)
        for module in (optimizer, _foreach_utils):
            exits.enter_context(patched(module, _get_foreach_kernels_supported_devices=with_cpu))
        yield
