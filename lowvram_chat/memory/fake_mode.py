"""torch's fake tensors, with a shorter way to the cache of what each operation returns.

FakeTensorMode remembers the shape that an operation returns for given arguments. Of a trace's time, a third went into
writing those arguments down, seventeen fields a tensor. Dense tensors differ in six of them.
Source: torch/_subclasses/fake_tensor.py, `_cache_key`, `extract_tensor_metadata` (2.13).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = frozenset({int, float, bool, type(None), torch.dtype, torch.device})
"""Types of arguments that stand for themselves."""


class BriefFakeTensorMode(FakeTensorMode):
    """A FakeTensorMode whose cache keys say only what can differ in a trace; other arguments go torch's own way."""

    def _prep_args_for_hash(self, result: list[Any], args: Any, *rest: Any) -> None:
        """Appends to `result` what tells these arguments from others."""
        if isinstance(args, dict):
            result.append(tuple(args))
            args = args.values()
        result.append(len(args))
        for argument in args:
            kind = type(argument)
            if kind is FakeTensor and argument.constant is None and argument.layout is torch.strided:
                result += _described(argument)
            elif kind in PLAIN:
                # The type too: 1 and 1.0 are equal, and make different results.
                result += (kind, argument)
            elif kind is list or kind is tuple:
                self._prep_args_for_hash(result, argument, *rest)
            else:
                super()._prep_args_for_hash(result, (argument,), *rest)


def _described(tensor: FakeTensor) -> Iterable[object]:
    # `fake_device`, since asking for `device` is a dispatched operation of its own.
    return (
        tensor.fake_device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.requires_grad,
    )
