"""Fused LoRA: base(x) + s (x A^T) B^T in fewer and larger matrix products than PEFT, and the same function.

PEFT multiplies by A, by B and by s and then adds. Each is a kernel that reads and writes the layer's whole output, and under
autocast PEFT first copies the input to float32. Here the sum is one kernel. On a CPU in fp32, products with 16 columns run
at half the rate of wide ones; there, folding A and B into a copy of the base weight saves two of six products. Layers that
need more (DoRA, dropout, several adapters, a merged adapter) run PEFT's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

FUSABLE_LAYERS = ("Linear", "Linear4bit")
"""Class names of the PEFT layers whose forward is replaced; the second is in `peft.tuners.lora.bnb`."""
MIN_TOKENS_PER_WIDTH = 4
"""Folding pays if a micro-batch has at least this many tokens per unit of the layer's smaller width."""


def fuse_adapters(model: nn.Module, *, fold: bool = False) -> int:
    """Replace the forward of the model's adapter layers, and return how many were replaced.

    `fold` folds adapters into a copy of the weights where that is faster; the copies take as much memory as the weights.
    """
    layers = _adapter_layers(model)
    for layer in layers:
        layer.forward = MethodType(partial(_fused_forward, fold=fold), layer)
    return len(layers)


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Run PEFT's own forward of the adapter layers while the context is open."""
    fused = [(layer, layer.__dict__.pop("forward")) for layer in _adapter_layers(model) if "forward" in layer.__dict__]
    try:
        yield
    finally:
        for layer, forward in fused:
            layer.forward = forward


@contextlib.contextmanager
def always_folded() -> Iterator[None]:
    """Fold adapters for batches of any size while the context is open, where the model folds them at all."""
    global MIN_TOKENS_PER_WIDTH
    before, MIN_TOKENS_PER_WIDTH = MIN_TOKENS_PER_WIDTH, 0
    try:
        yield
    finally:
        MIN_TOKENS_PER_WIDTH = before


def _adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers that have an adapter and whose forward can be replaced."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A") and type(layer).__name__ in FUSABLE_LAYERS]


def _fused_forward(self: Linear, x: torch.Tensor, *args: object, fold: bool = False, **kwargs: object) -> torch.Tensor:
    """Return the output (..., out) of an adapter layer for inputs (..., in); replaces `Linear.forward`."""
    names = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or not _is_plain(self, names[0], x):
        return type(self).forward(self, x, *args, **kwargs)
    a, b, scaling = _weight(self.lora_A, names[0]), _weight(self.lora_B, names[0]), self.scaling[names[0]]
    base = self.base_layer
    if fold and isinstance(base, Conv1D | nn.Linear) and _folding_pays(x, base):
        weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
        folded = _folded_product(x.flatten(0, -2), weight, base.bias, a, b, scaling)
        return folded.view(*x.shape[:-1], -1)
    result: torch.Tensor = base(x)
    inner = F.linear(x, a)
    total = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=scaling)
    return total.view(result.shape)


def _weight(layers: nn.ModuleDict, adapter: str) -> torch.Tensor:
    """Return the weight of one adapter's A or B."""
    weight = layers[adapter].weight
    assert isinstance(weight, torch.Tensor)
    return weight


class _FoldedContext(FunctionCtx):
    """What `_FoldedProduct` keeps for the backward pass."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    scaling: float


class _FoldedProduct(torch.autograd.Function):
    """x (W + s A^T B^T) + bias, for inputs (N, in), weight (in, out), bias (out,) or None, A (r, in) and B (out, r).

    The weight and the bias are frozen. The folded copy of the weight is kept for the backward pass.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes arguments by position)
        ctx: _FoldedContext,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return the layer's output (N, out)."""
        folded = torch.addmm(weight, a.t(), b.t(), alpha=scaling)
        ctx.save_for_backward(x, x @ (a * scaling).t(), folded, b)
        ctx.scaling = scaling
        return x @ folded if bias is None else torch.addmm(bias, x, folded)

    @staticmethod
    def backward(ctx: _FoldedContext, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B from the gradient of the output (N, out)."""
        x, inner, folded, b = ctx.saved_tensors
        d_out = upstream[0]
        d_a = (x.t() @ (d_out @ (b * ctx.scaling))).t()
        d_b = d_out.t() @ inner
        # Computed last, so that it is still in the processor's cache when the preceding layer reads it.
        d_x = d_out @ folded.t() if ctx.needs_input_grad[0] else None
        return d_x, None, None, d_a, d_b, None


_folded_product: Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float], torch.Tensor
] = _FoldedProduct.apply
"""`_FoldedProduct` as a typed function."""


def _folding_pays(x: torch.Tensor, base: nn.Linear | Conv1D) -> bool:
    """Return whether this is a training step in fp32 throughout, with enough tokens for folding to be faster.

    Folding copies the weight (in x out elements) and saves products that grow with N (in + out). Measured on steps run
    alternately: 4 % faster with N at 5 times the smaller width (width 256), 3 % slower with N at 1.7 times (GPT-2 small).
    """
    return (
        torch.is_grad_enabled()
        and x.dtype == base.weight.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        and x.numel() // x.size(-1) >= MIN_TOKENS_PER_WIDTH * min(base.weight.shape)
    )


def _is_plain(layer: Linear, name: str, x: torch.Tensor) -> bool:
    """Return whether an adapter is just a product of two matrices, in dtypes that can be multiplied with the input."""
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        and (torch.is_autocast_enabled(x.device.type) or x.dtype == layer.lora_A[name].weight.dtype)
    )
