"""A plain adapter's layer with its sum in one kernel: base(x) + s (x A^T) B^T, the same function as PEFT's.

PEFT multiplies by A, by B, by s and adds, each a kernel that reads and writes the layer's whole output, and under autocast it
first copies the input to float32. Whatever is not plain (DoRA, dropout, several adapters, a merged one) runs PEFT's forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional as F

LAYERS = ("Linear", "Linear4bit")
"""PEFT's layers whose forward is replaced; the second stands in `peft.tuners.lora.bnb`."""


def fuse_adapters(model: nn.Module) -> int:
    """Replace the forward of the model's adapter layers; return how many."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A") and type(layer).__name__ in LAYERS]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(self: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or not _is_plain(self, names[0], x):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    a, b, scaling = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight, self.scaling[names[0]]
    result: torch.Tensor = self.base_layer(x)
    inner = F.linear(x, a)
    total = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=scaling)
    return total.view(result.shape)


def _is_plain(layer: Linear, name: str, x: torch.Tensor) -> bool:
    """Return whether a layer's adapter is nothing but the product of two matrices, in types that meet."""
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        and (torch.is_autocast_enabled(x.device.type) or x.dtype == layer.lora_A[name].weight.dtype)
    )
