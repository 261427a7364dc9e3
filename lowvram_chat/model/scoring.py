"""Held-out loss: the exact mean over all labelled tokens, without ever collecting logits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowvram_chat.data.rows import MODEL_INPUTS, on_device
from lowvram_chat.model.compilation import uncompiled
from lowvram_chat.model.out_of_memory import is_out_of_memory
from lowvram_chat.units import count

if TYPE_CHECKING:
    import datasets
    from torch import nn

log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch of rows."""


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


def score(
    model: nn.Module,
    rows: datasets.Dataset,
    collate: Collate,
    batch_size: int,
    precision: str = "fp32",
) -> Score:
    """Return the loss of the rows under a model on which `model.loss.attach_loss` was called.

    Rows are sorted by length, longest first, and then batched. This needs the least padding, and if memory runs out, it does so
    at the first batch. Then batches are halved, which changes nothing but the time.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                return _score(model, _batches(rows, collate, batch_size), precision)
            except RuntimeError as error:
                if batch_size == 1 or not is_out_of_memory(error):
                    raise
                batch_size //= 2
                log.warning("out of memory in the evaluation: continuing with batches of %s", count(batch_size, "row"))
            if torch.cuda.is_available():  # outside the handler, because the error keeps the batch alive
                torch.cuda.empty_cache()
    finally:
        model.train(was_training)


def _batches(rows: datasets.Dataset, collate: Collate, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Yield the rows in batches, the longest rows first."""
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    for start in range(0, len(order), batch_size):
        yield collate([rows[number] for number in order[start : start + batch_size]])


@torch.no_grad()
def _score(model: nn.Module, batches: Iterator[Mapping[str, Any]], precision: str) -> Score:
    """Return the loss of these batches."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    tokens = 0
    with uncompiled(model):
        for batch in batches:
            tokens += batch["loss_positions"].numel()
            inputs = {name: on_device(batch[name], device) for name in MODEL_INPUTS if name in batch}
            with autocast(device.type, precision):
                total += model(**inputs)["loss"]
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
