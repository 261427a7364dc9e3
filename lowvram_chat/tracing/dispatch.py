"""What PyTorch passes to a dispatch mode: an operator, its arguments, and the tensors in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch

from lowvram_chat.private_names import check_private_names

if TYPE_CHECKING:
    from torch._ops import OpOverload

check_private_names("torch._ops.OpOverload")

Operator: TypeAlias = "OpOverload[..., object]"
"""One overload of an operator, such as `torch.ops.aten.mm.default`."""
Arguments = tuple[object, ...]
"""The positional arguments of an operator."""


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in an argument or a result: a tensor, or a (nested) tuple or list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def tensor_at(args: Arguments, position: int) -> torch.Tensor:
    """Return the argument at `position`, which the operator's schema declares to be a tensor."""
    argument = args[position]
    assert isinstance(argument, torch.Tensor), f"argument {position} is a {type(argument).__name__}"
    return argument
