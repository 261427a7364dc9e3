"""What the paper card cannot check: everything that looks at values, which no kernel has written.

The checks themselves run, because they allocate. What they find is ignored. Only those of `SKIPPED` do not run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from lowvram_chat.data.packing import documents_at_once
from lowvram_chat.errors import LowVramError

CHECKS = {
    "lowvram_chat.model.pretrained.check_tied_head": "compares the head of a file with the embeddings on the card",
    "lowvram_chat.training.model_setup.check_causal": "compares states of a 4-bit model, which is on the card already",
    "lowvram_chat.training.model_setup.isolate_documents": "the same for packed rows",
    "lowvram_chat.training.trainer.check_trainer_loss": "compares losses",
    "lowvram_chat.training.preflight.check_gradients": "compares gradients",
}
"""Check -> why it fails on the paper card."""
SKIPPED = {
    "lowvram_chat.model.pretrained.check_finite": (
        "the sum of a 4-bit model's weight is a leftover, after which the whole weight is looked at, as on no real card"
    ),
}
"""Check that does not run at all -> why."""


def ignore_values() -> None:
    """Let the checks of `CHECKS` run, and ignore what they find, in this process from now on. To be called once."""
    for path in CHECKS:
        module, name = _place(path)
        check = getattr(module, name)
        setattr(module, name, _ignored(check))
    for path in SKIPPED:
        module, name = _place(path)
        setattr(module, name, lambda *_: None)


def answer_for(*, packed: bool) -> None:
    """Let transformers find full rows in this process from now on: one document each, or several in each packed row.

    It asks the card whether positions restart and whether an attention mask is all ones, and reads a zero. Packed batches have as
    many documents as a plan allows for.
    """
    from transformers import masking_utils

    from lowvram_chat.data import rows

    find, is_all = masking_utils.find_packed_sequence_indices, masking_utils.fast_all

    def found(position_ids: torch.Tensor) -> torch.Tensor | None:
        documents: torch.Tensor | None = find(position_ids)
        return documents if packed else None

    def is_full(mask: Any) -> bool:
        is_all(mask)
        return True

    def most_documents(position_ids: torch.Tensor) -> rows.DocumentGroups:
        ends = torch.arange(documents_at_once(*position_ids.shape) + 1, dtype=torch.int32)
        return ((position_ids.numel(), ends),)

    vars(rows).update(_document_groups=most_documents)
    vars(masking_utils).update(find_packed_sequence_indices=found, fast_all=is_full)


def _place(path: str) -> tuple[ModuleType, str]:
    """Return the module and the name in a dotted path."""
    module, _, name = path.rpartition(".")
    return importlib.import_module(module), name


def _ignored(check: Callable[..., Any]) -> Callable[..., None]:
    """Return a check that never fails for what it finds. What the card itself refuses still fails: memory that it lacks."""

    @functools.wraps(check)
    def run(*args: object, **kwargs: object) -> None:
        try:
            check(*args, **kwargs)
        except LowVramError:
            return

    return run
