"""A few short conversations of the training rows, on which a trainer is checked before its first step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowvram_chat.data.rows import IGNORED_LABEL, TokenRow

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from trl import SFTConfig

    from lowvram_chat.data.rows import Collator
    from lowvram_chat.training.callbacks import TokenCounts

Batch = dict[str, Any]
"""A micro-batch: tensors, and the number of its real tokens."""
Samples = tuple[list[Batch], torch.Tensor | int | None]

MAX_DOCUMENTS = 2
"""Conversations in the micro-batch that is compared."""
MAX_TOKENS = 32
"""Tokens of each of these conversations."""


class CheckedTrainer(Protocol):
    """What the check needs of `training.trainer.ChatTrainer`."""

    args: SFTConfig
    counts: TokenCounts
    precision: str
    train_dataset: Dataset
    held_out_collator: Collator

    @property
    def trained_model(self) -> nn.Module:
        """The model, under its adapter if there is one."""

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Samples:
        """Return the micro-batches of a step, and the labelled tokens in all of them."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, *, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the loss of a micro-batch as it is trained on."""


def is_packed(trainer: CheckedTrainer) -> bool:
    """Return whether the training rows are packed."""
    return "documents" in trainer.train_dataset[0]


def first_documents(trainer: CheckedTrainer) -> list[TokenRow]:
    """Return the first conversations of the training rows, each cut to a window with at least one labelled token."""
    rows, max_length = trainer.train_dataset, trainer.args.max_length
    assert max_length is not None
    count = MAX_DOCUMENTS if is_packed(trainer) else min(MAX_DOCUMENTS, trainer.args.per_device_train_batch_size)
    tokens = min(MAX_TOKENS, max_length // MAX_DOCUMENTS)
    documents = (document for row in rows for document in _documents(row))
    labelled = (document for document in documents if document.loss_tokens)
    return [_window(document, tokens) for document in itertools.islice(labelled, count)]


def _documents(row: Mapping[str, Sequence[int]]) -> Iterator[TokenRow]:
    """Yield the conversations of a token row: one, or those of a packed row."""
    ends = list(itertools.accumulate(row.get("documents") or [len(row["input_ids"])]))
    for start, end in itertools.pairwise([0, *ends]):
        yield TokenRow(
            [int(token) for token in row["input_ids"][start:end]], [int(label) for label in row["labels"][start:end]]
        )


def _window(document: TokenRow, length: int) -> TokenRow:
    """Return at most `length` tokens of a conversation around its first labelled one."""
    first_label = next(place for place, label in enumerate(document.labels) if label != IGNORED_LABEL)
    start = max(0, first_label - length // 2)
    window = slice(start, start + length)
    return TokenRow(document.input_ids[window], [IGNORED_LABEL, *document.labels[window][1:]])


def rows_of(trainer: CheckedTrainer, documents: Sequence[TokenRow]) -> list[dict[str, list[int]]]:
    """Return conversations as rows for the trainer's collator: one row each, or one packed row."""
    if not is_packed(trainer):
        return [{"input_ids": document.input_ids, "labels": document.labels} for document in documents]
    return [
        {
            "input_ids": [token for document in documents for token in document.input_ids],
            "labels": [label for document in documents for label in document.labels],
            "documents": [len(document.input_ids) for document in documents],
        }
    ]
