"""A model built on the meta device, moved onto the traced card: every parameter and buffer becomes a fake tensor.

Constructors of adapters, 4-bit layers and 8-bit optimizers read or convert values, so they run before, on meta tensors;
the step runs after, on fake ones.
"""

from __future__ import annotations

from typing import Any

import torch

from lowvram_chat.tracing.recorder import TraceRecorder

Materialised = dict[torch.Tensor, torch.Tensor]
"""Meta tensor -> the fake tensor that stands for it; a tied weight once."""


def materialise(model: torch.nn.Module, recorder: TraceRecorder) -> Materialised:
    """Moves `model` onto the traced card, in the order of `Module.to(device)`.

    That is children first, then a module's own parameters, then its buffers. Returns what replaced what; give it to
    `repoint` for an optimizer that was built before.
    """
    moved: Materialised = {}
    _move(model, moved)
    recorder.label(model.parameters(), "weights")
    recorder.label(model.buffers(), "buffers")
    recorder.name_modules(model)
    return moved


def repoint(optimizer: torch.optim.Optimizer, moved: Materialised) -> None:
    """Lets an optimizer that was built on the meta model step on the traced one."""
    for group in optimizer.param_groups:
        group["params"] = [moved.get(parameter, parameter) for parameter in group["params"]]


def _move(module: torch.nn.Module, moved: Materialised) -> None:
    for child in module.children():
        _move(child, moved)
    holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in holders:
        for name, tensor in tensors.items():
            if tensor is not None:
                tensors[name] = moved[tensor] if tensor in moved else moved.setdefault(tensor, _fake(tensor))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_like(tensor, device="cpu")
    if not isinstance(tensor, torch.nn.Parameter):
        return fake
    return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
