"""Moves a model from the meta device to the traced device: every parameter and buffer becomes a fake tensor.

The constructors of adapters, 4-bit layers and 8-bit optimizers read or convert values. They therefore run first, on meta
tensors; the step runs afterwards, on fake tensors.
"""

from __future__ import annotations

import itertools

import torch

from lowvram_chat.tracing.recorder import TraceRecorder

Materialised = dict[torch.Tensor, torch.Tensor]
"""Meta tensor -> the fake tensor that replaces it. A tied weight has one entry."""


def materialise(model: torch.nn.Module, recorder: TraceRecorder, moved: Materialised | None = None) -> Materialised:
    """Move `model` to the traced device, in the order of `Module.to(device)`.

    That order is: children first, then a module's own parameters, then its buffers. What is in `moved` has moved already. Return
    the replaced tensors; pass them to `repoint` for an optimizer that was built before.
    """
    moved = {} if moved is None else moved
    _move(model, moved)
    recorder.label(model.parameters(), "weights")
    recorder.label(model.buffers(), "buffers")
    recorder.name_modules(model)
    return moved


def repoint(optimizer: torch.optim.Optimizer, moved: Materialised) -> None:
    """Let an optimizer that was built on the meta model update the traced model."""
    for group in optimizer.param_groups:
        group["params"] = [moved.get(parameter, parameter) for parameter in group["params"]]


def _move(module: torch.nn.Module, moved: Materialised) -> None:
    """Replace the tensors of a module and its children by fake ones, and add them to `moved`."""
    for child in module.children():
        _move(child, moved)
    own = itertools.chain(
        module.named_parameters(recurse=False, remove_duplicate=False),
        module.named_buffers(recurse=False, remove_duplicate=False),
    )
    for name, tensor in list(own):
        setattr(module, name, moved[tensor] if tensor in moved else moved.setdefault(tensor, fake_like(tensor)))


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor, or a fake parameter, like a meta one."""
    fake = torch.empty_like(tensor, device="cpu")
    if not isinstance(tensor, torch.nn.Parameter):
        return fake
    return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
