"""How the traced device differs from the fake CPU that the trace runs on. By default, not at all.

`DeviceRules` describes the CPU; `cuda_rules.CudaRules` describes a GPU. The recorder uses only this interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.utils import import_utils

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Arguments, Operator
from lowvram_chat.tracing.patching import patched

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lowvram_chat.recipe.schema import Recipe

DETECTS_FAKE_TENSORS = int(transformers.__version__.partition(".")[0]) >= 5
"""Whether transformers treats fake tensors differently from real ones. Version 4 does not know them."""

if DETECTS_FAKE_TENSORS:
    check_private_names("transformers.utils.import_utils.is_fake_tensor")

Scalar = bool | int | float
"""What `.item()` returns."""


class DeviceRules:
    """A device that behaves like PyTorch's CPU build.

    `plain_rows` answers the questions that a model's code asks about the values in a batch. True stands for rows of one
    document each, whose attention mask, if any, is all ones. False stands for padded or packed rows.
    """

    def __init__(self, *, plain_rows: bool = False) -> None:
        self.plain_rows = plain_rows

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this device's substitutions are in force."""
        return hide_fake_tensors()

    def has_varlen_attention(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Return whether packed rows of this recipe have attention by document, on a card (`model.varlen_attention`)."""
        return False

    def temporaries(self, func: Operator, args: Arguments, result: object) -> Iterable[int]:
        """Return the sizes, in bytes, of the buffers that an operation's kernel holds while it runs.

        The buffers exist together, after the operation's results have been allocated.
        """
        return ()

    def has_buffers_first(self, func: Operator) -> bool:
        """Return whether an operation allocates these buffers before its results."""
        return False

    def workspace(self, func: Operator) -> int:
        """Return the bytes that the first operation of this kind allocates and never frees, once in each thread."""
        return 0

    def allocation_order(self, func: Operator, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the results of an operation in the order in which its kernel allocates them."""
        return tensors

    def scalar(self, tensor: torch.Tensor) -> Scalar:
        """Return what `.item()` gives for a fake tensor, which has no value.

        Booleans answer "is this mask all ones?" and "is each row one document?". Numbers are 1, so that code can divide
        by a step count.
        """
        if tensor.dtype == torch.bool:
            return self.plain_rows
        return 1.0 if tensor.dtype.is_floating_point else 1


def hide_fake_tensors() -> contextlib.AbstractContextManager[None]:
    """Return a context in which transformers takes fake tensors for real ones.

    Otherwise it would build attention masks that a real run does not need.
    Source: transformers/masking_utils.py (5.x), `find_packed_sequence_indices`, `_ignore_causal_mask_sdpa`.
    """
    return patched(import_utils, is_fake_tensor=_never_fake) if DETECTS_FAKE_TENSORS else contextlib.nullcontext()


def _never_fake(_: object) -> bool:
    return False
