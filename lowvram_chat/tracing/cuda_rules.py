"""What a CUDA card does differently from the fake CPU of the trace, each thing in one small named place.

- `cuda_attention`: which kernel `scaled_dot_product_attention` picks, and so what it saves and what it needs meanwhile;
- `cuda_dropout`: the fused kernel, which keeps a mask of one byte an element;
- `cuda_log_softmax`: fp16 logits are not copied to fp32 first;
- `cuda_foreach_default`: torch's optimizers and `clip_grad_norm_` take their foreach implementations;
- `TEMPORARY_BUFFERS`: memory that lives inside a kernel, where the trace cannot see it;
- `cuda_autocast` (its own file): the operations that autocast casts on CUDA and not on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils import _foreach_utils

from lowvram_chat.tracing.cuda_autocast import autocast_type, cuda_autocast
from lowvram_chat.tracing.operations import ALIGNMENT_BYTES, HALF_TYPES
from lowvram_chat.tracing.rules import DeviceRules

aten = torch.ops.aten

FLASH_CAPABILITY = (8, 0)
"""FlashAttention-2 needs Ampere."""
CUBLASLT_WORKSPACE_BYTES = 1 << 20
MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})


class CudaRules(DeviceRules):
    """A CUDA card of the given compute capability; `cublas_workspace_bytes` is taken once by each of two threads.

    cuBLAS takes a workspace at a thread's first matrix product: the main thread in the forward pass, autograd's thread
    in the backward pass; 8.125 MiB on 8.x, 0 where CUBLAS_WORKSPACE_CONFIG is `:0:0`.
    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`.
    """

    def __init__(
        self,
        compute_capability: tuple[int, int] = (8, 6),
        *,
        cublas_workspace_bytes: int = 0,
        plain_rows: bool = False,
    ) -> None:
        super().__init__(plain_rows=plain_rows)
        self.compute_capability = compute_capability
        self.cublas_workspace_bytes = cublas_workspace_bytes

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Puts every substitution of this file in force."""
        with super().active(), cuda_foreach_default(), cuda_autocast(), cuda_functions(self.compute_capability):
            yield

    def temporaries(self, func: Any, args: tuple[Any, ...], result: Any) -> Iterable[int]:
        """Sizes in bytes of the buffers inside an operation's CUDA kernel."""
        sizes = TEMPORARY_BUFFERS.get(func) or TEMPORARY_BUFFERS_BY_NAME.get(str(func))
        return sizes(args) if sizes else ()

    def workspace(self, func: Any) -> int:
        """Bytes that a thread's first matrix product takes for good."""
        return self.cublas_workspace_bytes if func in MATRIX_PRODUCTS else 0

    def allocation_order(self, func: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of an operation in the order in which its CUDA kernel allocates them.

        Dropout takes the mask first. Source: aten/src/ATen/native/cuda/Dropout.cu, `dropout_cuda`.
        """
        return tensors[::-1] if func is aten.native_dropout.default else tensors


@contextlib.contextmanager
def cuda_functions(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Puts the stand-ins for CUDA's kernels in the places where models look them up.

    A function mode would not do: autograd switches it off, and a checkpoint's forward runs again in the backward pass.
    """
    functions: Any = functional
    stand_ins = {
        "dropout": cuda_dropout,
        "log_softmax": cuda_log_softmax,
        "scaled_dot_product_attention": partial(cuda_attention, compute_capability=compute_capability),
    }
    before = {name: getattr(functions, name) for name in stand_ins}
    vars(functions).update(stand_ins)
    try:
        yield
    finally:
        vars(functions).update(before)


def cuda_log_softmax(
    input: torch.Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Log-softmax as CUDA does it: fp16 that is wanted as fp32 is cast while it is read, not copied first.

    Source: aten/src/ATen/native/SoftMax.cpp, `log_softmax`.
    """
    if input.dtype == torch.float16 and dtype == torch.float32:
        return cast(torch.Tensor, aten._log_softmax(input, dim, True))
    return input.log_softmax(dim, dtype=dtype)


def cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout as CUDA does it: one kernel that returns the result and a mask of booleans.

    Source: aten/src/ATen/native/Dropout.cpp, `is_fused_kernel_acceptable`.
    """
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)


def cuda_attention(  # noqa: PLR0917  (the signature that it stands in for)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    compute_capability: tuple[int, int],
) -> torch.Tensor:
    """Attention (B, H, T, D) by the kernel that CUDA picks: flash, else memory-efficient, else plain arithmetic.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `select_sdp_backend` (cuDNN is not tried before 9.0).
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    mask = None if attn_mask is None else _bias(attn_mask, query)
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if mask is None and query.dtype in HALF_TYPES and compute_capability >= FLASH_CAPABILITY and query.shape[-1] <= 256:
        return cast(torch.Tensor, aten._scaled_dot_product_flash_attention(query, key, value, **options)[0])
    if enable_gqa:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
    if query.shape[-1] * query.element_size() % ALIGNMENT_BYTES == 0:  # the memory-efficient kernel reads such pieces
        saves = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        results = aten._scaled_dot_product_efficient_attention(query, key, value, mask, saves, **options)
        return cast(torch.Tensor, results[0])
    return cast(torch.Tensor, aten._scaled_dot_product_attention_math(query, key, value, mask, **options)[0])


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    wanted = autocast_type()
    return tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)


def _bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The mask as the kernel takes it: added to the scores, of the compute type, rows padded, expanded (as a view).

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
    """Makes the fake CPU a device where torch.optim and gradient clipping choose foreach, as they do on CUDA.

    Source: torch/optim/optimizer.py, `_default_to_fused_or_foreach`; torch/utils/_foreach_utils.py.
    """
    optimizer: Any = importlib.import_module("torch.optim.optimizer")  # torch.optim hides the name
    devices = _foreach_utils._get_foreach_kernels_supported_devices
    with contextlib.ExitStack() as exits:
        for types in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
            types.append(FakeTensor)
            exits.callback(types.remove, FakeTensor)
        modules: tuple[Any, ...] = (optimizer, _foreach_utils)
        for module in modules:
            exits.callback(setattr, module, "_get_foreach_kernels_supported_devices", devices)
            module._get_foreach_kernels_supported_devices = lambda: [*devices(), "cpu"]
        yield


def _efficient_backward(args: tuple[Any, ...]) -> list[int]:
    """Row sums of gradient x output in fp32; in half precision the query's gradient is summed in fp32 as well.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, `_efficient_attention_backward`.
    """
    query = args[1]
    rows = 4 * query.numel() // query.shape[-1]
    return [rows, 4 * query.numel()] if query.dtype in HALF_TYPES else [rows]


def _flash_backward(args: tuple[Any, ...]) -> list[int]:
    """Row sums and the query's gradient in fp32, rows padded to 128; where heads share keys, both gradients unshared.

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`.
    """
    batch, heads, length, width = args[1].shape
    rows = 4 * batch * heads * (-(-length // 128) * 128)
    key = args[2]
    unshared = key.element_size() * key.numel() // key.shape[1] * heads if key.shape[1] != heads else 0
    return [rows, rows * (-(-width // 32) * 32), *([unshared] * 2 if unshared else [])]


def _embedding_backward(args: tuple[Any, ...]) -> list[int]:
    """Token ids sorted, with their places, offsets of equal ids, and partial sums for the most ids there can be.

    Up to 3,072 tokens a kernel without buffers is taken. Source: aten/src/ATen/native/cuda/Embedding.cu,
    `embedding_dense_backward_cuda`; EmbeddingBackwardKernel.cu, `max_partial_segment` (NROWS_PER_THREAD is 10).
    """
    width, tokens, vocabulary = args[0].shape[-1], args[1].numel(), args[2]
    if tokens <= 3072:
        return []
    segments = min(tokens, vocabulary)
    partial_sums = tokens // 10 + segments
    return [
        8 * tokens,
        8 * tokens,
        8 * segments,
        8 * segments,
        8 * segments,
        8 * partial_sums,
        4 * width * partial_sums,
    ]


def _addmm(args: tuple[Any, ...]) -> list[int]:
    """cuBLASLt's workspace for a product with a bias row.

    Source: aten/src/ATen/cuda/CUDABlas.cpp, `_getWorkspaceSize`, `gemm_and_bias` (1 MiB in torch 2.6).
    """
    return [CUBLASLT_WORKSPACE_BYTES] if args[0].dim() == 1 else []


TEMPORARY_BUFFERS: Mapping[Any, Callable[[tuple[Any, ...]], list[int]]] = {
    aten.addmm.default: _addmm,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}
"""Operation -> sizes in bytes of its kernel's own buffers, from its arguments."""


def _gemm_4bit(args: tuple[Any, ...]) -> list[int]:
    """The weight, dequantised to the compute type. Small batches have a kernel without it, chosen by card and shape.

    Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback` (always above 1,536 tokens).
    """
    rows, columns = args[2]
    return [rows * columns * args[0].element_size()]


TEMPORARY_BUFFERS_BY_NAME: Mapping[str, Callable[[tuple[Any, ...]], list[int]]] = {
    "bitsandbytes.gemm_4bit.default": _gemm_4bit
}
"""The same for operations that exist only once their library is imported."""
