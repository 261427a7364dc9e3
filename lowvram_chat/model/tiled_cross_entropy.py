"""Fused linear cross-entropy: the loss of hidden states under a head, in tiles, without ever holding all logits.

The hidden states of the labelled positions (N, d) are multiplied by the head (V, d) in tiles of a few
rows. Each tile's gradient is computed while its logits exist, so nothing of size (N, V) is kept for the backward pass and no
product is computed twice. Source of the idea: Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

TileFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits (rows, V), targets (rows, 1)) -> (summed loss () in fp32, gradient of the logits (rows, V))."""

VOCABULARY_MULTIPLE = 64
"""Half-precision products are fast if a matrix's rows start at multiples of 16 bytes: rows of 50,304 columns do, of 50,257 not.
Source: NVIDIA's deep-learning performance guide, "Requirements to use tensor cores"."""


class Tiling(NamedTuple):
    """How the product with the head is split into tiles, and to what multiple its vocabulary is rounded up."""

    rows: int
    """Rows of logits in a tile. 512 x 50,257 logits take 98 MiB in fp32 and 49 MiB in fp16, and both exist briefly."""
    multiple: int = VOCABULARY_MULTIPLE
    """The vocabulary is rounded up to a multiple of this; 1 leaves it as it is."""
    always: bool = False
    """Round up in fp32 too, which is faster on a CPU. Otherwise only half precision is rounded up: there it costs at most a
    copy of the head."""


CUDA_TILING = Tiling(512)
CPU_TILING = Tiling(2048, always=True)
"""Tiles of 512 rows, which save memory on a GPU, made loss and gradient 4 to 9 % slower on a CPU."""

HEAD_GRADIENT_SCALE = 0.125
"""The head's gradient is summed at this scale, so that it does not overflow in fp16."""


class _LossContext(FunctionCtx):
    """What `_TiledCrossEntropy` keeps for the backward pass: the gradients of hidden states, weight and bias."""

    needs_input_grad: tuple[bool, ...]
    gradients: list[torch.Tensor | None]


class _TiledCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of (N, d) hidden states under a (V, d) head, with a (V,) bias or None."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position)
        ctx: _LossContext,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tiling: Tiling,
        cap: float | None,
        compiled: bool,
    ) -> torch.Tensor:
        """Return the summed loss () in fp32, and keep the gradients for the backward pass.

        `cap` bounds the logits z: they become cap * tanh(z / cap), in fp32.
        `compiled` fuses a tile's passes over its logits, except in fp32 on a CPU, where `_softmax_loss_and_gradient` is
        faster.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        loss_and_gradient = _tile_function(device, dtype, compiled=compiled)
        needs_hidden, needs_weight, needs_bias = (needed for needed in ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        size, padded = weight.size(0), _padded_size(weight, dtype, tiling)
        # Allocated before the head's copy, which is freed after the loop.
        d_weight = weight.new_zeros(padded if dtype == weight.dtype else size, weight.size(1)) if needs_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        head = _padded_head(weight, dtype, padded)
        buffer = _logits_buffer(min(tiling.rows, hidden.size(0)), head)
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.size(0), tiling.rows):
                rows = slice(start, start + tiling.rows)
                states = hidden[rows].to(dtype)
                logits = _tile_logits(states, head, buffer)
                if bias is not None:
                    logits[:, :size] += bias
                slope = None if cap is None else _cap_in_place(logits, cap)
                logits[:, size:] = -torch.inf
                loss, gradient = loss_and_gradient(logits, targets[rows, None])
                if slope is not None:
                    gradient *= slope
                total += loss
                if d_hidden is not None:
                    d_hidden[rows] = gradient @ head
                if d_weight is not None:
                    _add_product(d_weight, gradient.t(), states * HEAD_GRADIENT_SCALE)
                if d_bias is not None:
                    d_bias += gradient.sum(0)[:size]
                del logits, gradient, slope
        if d_weight is not None and d_weight.size(0) != size:
            d_weight.resize_(weight.shape)  # in place: autograd would copy a view
        ctx.gradients = [d_hidden, d_weight, d_bias]
        return total

    @staticmethod
    def backward(ctx: _LossContext, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the kept gradients times the upstream gradient (). They are scaled in place, so this can run only once."""
        gradients, ctx.gradients = ctx.gradients, []
        scales = (upstream[0], upstream[0] / HEAD_GRADIENT_SCALE, upstream[0])
        scaled = (None if g is None else g.mul_(scale) for g, scale in zip(gradients, scales, strict=True))
        return (*scaled, None, None, None, None)


tiled_cross_entropy: Callable[..., torch.Tensor] = _TiledCrossEntropy.apply
"""`_TiledCrossEntropy` as a typed function."""


def _padded_size(weight: torch.Tensor, dtype: torch.dtype, tiling: Tiling) -> int:
    """Return the number of rows V' that the head (V, d) has in the products."""
    size = weight.size(0)
    is_padded = tiling.always or dtype != torch.float32
    return -(-size // tiling.multiple) * tiling.multiple if is_padded else size


def _padded_head(weight: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Return the head (V', d) in the dtype of the products: the weight (V, d) itself if possible, else a copy with zero rows."""
    if dtype == weight.dtype and rows == weight.size(0):
        return weight
    head = weight.new_empty((rows, weight.size(1)), dtype=dtype)
    head[: weight.size(0)] = weight
    head[weight.size(0) :] = 0
    return head


def _logits_buffer(rows: int, head: torch.Tensor) -> torch.Tensor | None:
    """Return memory that all tiles' fp32 logits reuse, since new pages are slow on a CPU; None in half precision."""
    return head.new_empty(rows, head.size(0)) if head.dtype == torch.float32 else None


def _tile_logits(states: torch.Tensor, head: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return a tile's logits (rows, V') in the dtype of the products, in the buffer if there is one."""
    if buffer is None:
        return F.linear(states, head)
    return torch.mm(states, head.t(), out=buffer[: states.size(0)])


def _cap_in_place(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Replace logits z (rows, V') by cap * tanh(z / cap), and return the slope 1 - tanh(z / cap)^2 in their dtype."""
    logits.div_(cap).tanh_()
    slope = torch.addcmul(torch.ones((), dtype=logits.dtype, device=logits.device), logits, logits, value=-1)
    logits.mul_(cap)
    return slope


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total`. A half-precision product is rounded first, and its padding rows are left out."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right)[: total.size(0)]


def _tile_function(device: str, dtype: torch.dtype, *, compiled: bool) -> TileFunction:
    """Return the fastest function for a tile's loss and gradient on this type of device."""
    if device == "cpu" and dtype == torch.float32:
        return _softmax_loss_and_gradient
    return _compiled_loss_and_gradient() if compiled else _loss_and_gradient


def _softmax_loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `_loss_and_gradient`, for fp32 logits on a CPU, where softmax is faster than exp of a whole tile.

    The logarithm of a row's sum is taken from its largest entry, whose probability never underflows.
    """
    largest = logits.amax(1, keepdim=True)
    target_log_probabilities = logits.gather(1, targets) - largest
    gradient = torch.softmax(logits, 1, out=logits)
    target_log_probabilities += gradient.amax(1, keepdim=True).log()
    return -target_log_probabilities.sum(), gradient.scatter_(1, targets, target_log_probabilities.expm1())


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tile's summed loss () in fp32, and softmax - one-hot (rows, V) in the logits' memory and dtype.

    `targets` is (rows, 1). It passes over the tile twice, with log probabilities in fp32 in between: on a GPU this is bound
    by memory bandwidth, not by arithmetic.
    """
    log_probabilities = _log_softmax(logits)
    target_log_probabilities = log_probabilities.gather(1, targets)
    gradient = torch.exp(log_probabilities, out=logits)
    # p - 1 is computed in fp32 and rounded once: if p were rounded first, p - 1 would be inaccurate for p close to 1.
    return -target_log_probabilities.sum(), gradient.scatter_(
        1, targets, target_log_probabilities.expm1().to(gradient.dtype)
    )


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities (rows, V) in fp32; fp32 logits are overwritten."""
    if logits.dtype == torch.float16:  # the CUDA kernel casts fp16 as it reads, but would copy bf16 first
        return F.log_softmax(logits, 1, dtype=torch.float32)
    logits = logits.float()
    return torch.log_softmax(logits, 1, out=logits)


@functools.cache
def _compiled_loss_and_gradient() -> TileFunction:
    """Return `_loss_and_gradient`, compiled once for any number of rows."""
    return torch.compile(_loss_and_gradient, dynamic=True)
