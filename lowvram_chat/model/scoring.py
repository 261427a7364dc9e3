"""Held-out loss: the exact mean over all labelled tokens, without ever collecting logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowvram_chat.data.rows import MODEL_INPUTS
from lowvram_chat.model.compilation import uncompiled

if TYPE_CHECKING:
    import datasets
    from torch import nn


@dataclass(frozen=True)
class Score:
    """A held-out loss."""

    nats: float
    """Summed cross-entropy, in nats."""
    tokens: int
    """Number of labelled tokens."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss capped at 700 against overflow."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def score(
    model: nn.Module,
    rows: datasets.Dataset,
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    batch_size: int,
    precision: str = "fp32",
) -> Score:
    """Return the loss of the rows under a model on which `model.loss.attach_loss` was called.

    Rows are sorted by length, longest first, and then batched. This needs the least padding, and if memory runs out, it does so
    at the first batch.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    total = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    tokens = 0
    with uncompiled(model):
        for start in range(0, len(order), batch_size):
            batch = collate([rows[number] for number in order[start : start + batch_size]])
            tokens += batch["loss_positions"].numel()
            inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
            with autocast(device.type, precision):
                total += model(**inputs)["loss"]
    model.train(was_training)
    return Score(nats=total.item(), tokens=tokens)


def row_lengths(rows: Any) -> list[int]:
    """Return the number of tokens in each row: the `length` column of a dataset, or the counted tokens of other rows."""
    if hasattr(rows, "column_names"):
        return list(rows["length"][:])
    return [len(row["input_ids"]) for row in rows]


def autocast(device_type: str, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context for a recipe's `train.precision`; for fp32 it does nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device_type, torch.float16 if precision == "fp16" else torch.bfloat16)
