"""Sizes of the buffers that CUDA kernels allocate internally, where a trace cannot see them.

Each function takes the positional arguments of its operation and returns the sizes in bytes. `TEMPORARY_BUFFERS` and
`TEMPORARY_BUFFERS_BY_NAME` map operations to these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Arguments, Operator
from lowvram_chat.tracing.operations import HALF_TYPES

check_private_names(
    "torch.ops.aten._softmax_backward_data.default",
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward.default",
)

aten = torch.ops.aten

MAX_TOKENS_WITHOUT_SORT = 3072
"""Token ids up to which the backward pass of an embedding uses a kernel without buffers."""
MAX_FUSED_4BIT_TOKENS = 8
"""Tokens up to which a product with a 4-bit weight runs without a buffer on every card."""

BufferSizes = Callable[..., list[int]]
"""Computes sizes in bytes from the positional arguments of an operation."""


def temporary_buffers(func: Operator, args: Arguments) -> list[int]:
    """Return the sizes, in bytes, of the buffers inside an operation's CUDA kernel."""
    sizes = TEMPORARY_BUFFERS.get(func) or TEMPORARY_BUFFERS_BY_NAME.get(str(func))
    return sizes(*args) if sizes else []


def _efficient_backward(gradient: torch.Tensor, query: torch.Tensor, *_: object) -> list[int]:
    """Row sums of gradient x output in fp32. In half precision, the query's gradient is also summed in fp32.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, `_efficient_attention_backward`.
    """
    rows = 4 * query.numel() // query.shape[-1]
    return [rows, 4 * query.numel()] if query.dtype in HALF_TYPES else [rows]


def _flash_backward(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: object) -> list[int]:
    """Row sums and the query's gradient in fp32, with rows padded to a multiple of 128.

    Where query heads share keys, the gradients of keys and values are first computed for every query head.
    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`.
    """
    batch, heads, length, width = query.shape
    rows = 4 * batch * heads * (-(-length // 128) * 128)
    expanded = key.element_size() * key.numel() // key.shape[1] * heads if key.shape[1] != heads else 0
    return [rows, rows * (-(-width // 32) * 32), *([expanded] * 2 if expanded else [])]


def _varlen_backward(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *arguments: Any) -> list[int]:
    """The same over documents: (T, H, D) tokens, with 128 more rows for each document.

    Source: flash_api.cpp, `mha_varlen_bwd`.
    """
    tokens, heads, width = query.shape
    documents = arguments[3].numel() - 1
    rows = 4 * heads * (tokens + 128 * documents)
    expanded = key.element_size() * tokens * heads * width if key.shape[1] != heads else 0
    return [rows, rows * (-(-width // 32) * 32), *([expanded] * 2 if expanded else [])]


def _embedding_backward(gradient: torch.Tensor, ids: torch.Tensor, vocabulary: int, *_: object) -> list[int]:
    """Sorted token ids, their positions, the offsets of equal ids, and partial sums for the largest possible id count.

    Up to 3,072 tokens, a kernel without buffers runs. Source: aten/src/ATen/native/cuda/Embedding.cu,
    `embedding_dense_backward_cuda`; EmbeddingBackwardKernel.cu, `max_partial_segment` (NROWS_PER_THREAD is 10).
    """
    width, tokens = gradient.shape[-1], ids.numel()
    if tokens <= MAX_TOKENS_WITHOUT_SORT:
        return []
    segments = min(tokens, vocabulary)
    partial_sums = tokens // 10 + segments
    return [*[8 * tokens] * 2, *[8 * segments] * 3, 8 * partial_sums, 4 * width * partial_sums]


def _softmax_backward(gradient: torch.Tensor, *_: object) -> list[int]:
    """The product of gradient and output. Source: aten/src/ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out`."""
    return [gradient.nbytes]


def _gemm_4bit(states: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], *_: object) -> list[int]:
    """The weight, dequantised to the compute type.

    Small batches have a kernel without this buffer; bitsandbytes chooses by GPU and shape.
    Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback` (always above 1,536 tokens, never up to 8).
    """
    rows, columns = shape
    if states.numel() // states.shape[-1] <= MAX_FUSED_4BIT_TOKENS:
        return []
    return [rows * columns * states.element_size()]


TEMPORARY_BUFFERS: Mapping[Operator, BufferSizes] = {
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._softmax_backward_data.default: _softmax_backward,
}
"""Operation -> sizes of its kernel's buffers."""
BUFFER_BEFORE_RESULT = frozenset({"bitsandbytes.gemm_4bit.default"})
"""Operations that allocate their buffers before their results."""
TEMPORARY_BUFFERS_BY_NAME: Mapping[str, BufferSizes] = {
    "bitsandbytes.gemm_4bit.default": _gemm_4bit,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}
"""The same for operations that exist only after their library is imported."""
