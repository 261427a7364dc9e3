"""What a traced machine does differently from the fake CPU that the trace runs on: nothing, by default.

`DeviceRules` is the CPU itself; `cuda_rules.CudaRules` is a card. The recorder knows only this interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.utils import import_utils

Scalar = bool | int | float


class DeviceRules:
    """A machine that does what PyTorch's CPU build does.

    `plain_rows` says what the model's code will find when it looks into a batch: True for rows of one document each
    whose attention mask, if there is one, is all ones; False for padded or packed rows.
    """

    def __init__(self, *, plain_rows: bool = False) -> None:
        self.plain_rows = plain_rows

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The substitutions, in force while the context is open."""
        return hide_fake_tensors()

    def temporaries(self, func: Any, args: tuple[Any, ...], result: Any) -> Iterable[int]:
        """Sizes in bytes of the buffers that an operation's kernel holds while it runs, after its results are there."""
        return ()

    def workspace(self, func: Any) -> int:
        """Bytes that the first operation of this kind takes for good, once in each thread."""
        return 0

    def allocation_order(self, func: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of an operation in the order in which its kernel allocates them."""
        return tensors

    def scalar(self, tensor: torch.Tensor) -> Scalar:
        """What `.item()` says of a value that a fake tensor does not have.

        Truth values answer "is this mask all ones?" and "is this one document a row?"; numbers are 1, so that a step
        count can be divided by.
        """
        if tensor.dtype == torch.bool:
            return self.plain_rows
        return 1.0 if tensor.dtype.is_floating_point else 1


@contextlib.contextmanager
def hide_fake_tensors() -> Iterator[None]:
    """Hides from transformers that tensors are fake: it would build attention masks that a real run does without.

    Source: transformers/masking_utils.py (5.x), `find_packed_sequence_indices`, `_ignore_causal_mask_sdpa`.
    """
    module: Any = import_utils
    notices = getattr(module, "is_fake_tensor", None)
    if notices is not None:
        module.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        if notices is not None:
            module.is_fake_tensor = notices
