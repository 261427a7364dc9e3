"""Cuts token rows to length, splits them into training and held-out rows, and collates them into batches.

Rows are padded on the right and the model is causal, so no real token attends to the padding. Batches therefore need no
attention mask, and attention runs its plain causal kernel. Packed rows have positions that restart with each document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lowvram_chat.data.packing import documents_at_once

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch
    from numpy.typing import NDArray

IGNORED_LABEL = -100
"""Label of a token that carries no loss; the default of torch.nn.functional.cross_entropy."""

MODEL_INPUTS = ("input_ids", "labels", "loss_positions", "position_ids", "document_groups", "attention_mask")
"""Keys of a batch that are passed to the model, where the batch has them."""

DocumentGroups: TypeAlias = "tuple[tuple[int, torch.Tensor], ...]"
"""For each group of documents its number of tokens, and 0 and the end of each document in it (N + 1,)."""
Batch = dict[str, Any]
"""Tensors of a batch by name, and `real_tokens`, the number of its tokens without padding."""


@dataclass(frozen=True)
class TokenRow:
    """Token ids and labels of equal length. The first label is always `IGNORED_LABEL`: nothing before it predicts it."""

    input_ids: list[int]
    labels: list[int]

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL)


def cut_to_length(tokens: list[int], labels: list[int], max_length: int, overflow: str) -> Iterator[TokenRow]:
    """Yield the rows of a conversation: its first `max_length` tokens, or with `split` windows that together hold all.

    Windows overlap by one token. The first token of a row has nothing before it that could predict it, so that token of a
    later window carries its loss in the window before, where it is the last one. No label is lost.
    """
    starts = range(0, max(1, len(tokens) - 1), max_length - 1) if overflow == "split" else range(1)
    for start in starts:
        window = slice(start, start + max_length)
        yield TokenRow(tokens[window], [IGNORED_LABEL, *labels[window][1:]])


def split_by_conversation(
    rows: datasets.Dataset, conversations: int, fraction: float, seed: int, limit: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (training rows, held-out rows).

    A seeded choice excludes the share `fraction` of the source's `conversations` from training. The rows of at most `limit`
    of them are held out (None: of all).

    The choice depends only on the number of a conversation, not on its length or loss. The same conversations are therefore
    held out with other settings of the rows. All windows of a conversation are on the same side.
    """
    import numpy

    conversation_of_row = numpy.asarray(rows["conversation"][:])
    is_chosen = chosen_conversations(conversations, fraction, seed)[conversation_of_row]
    is_held_out = is_chosen
    if limit is not None:
        first_chosen = numpy.unique(conversation_of_row[is_chosen])[:limit]
        is_held_out = numpy.isin(conversation_of_row, first_chosen)
    return rows.select(numpy.flatnonzero(~is_chosen)), rows.select(numpy.flatnonzero(is_held_out))


def held_out_conversations(conversations: int, fraction: float) -> int:
    """Return how many of the conversations are held out: at least one."""
    return max(1, round(fraction * conversations))


def chosen_conversations(conversations: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return for each conversation (N,) whether it is among the share that is held out."""
    import numpy

    is_chosen = numpy.zeros(conversations, dtype=bool)
    order = numpy.random.default_rng(seed).permutation(conversations)
    is_chosen[order[: held_out_conversations(conversations, fraction)]] = True
    return is_chosen


class Collator:
    """Collates rows into a batch of right-padded (B, T) int64 tensors.

    `loss_positions` (N,) are the indices, in the flattened (B * T,) batch, of the tokens that predict a labelled token. They
    are computed here, on the host, so that the loss need not synchronize with the device. Packed rows also give
    `position_ids` (B, T), and `document_groups`: the documents of the flattened batch in groups of at most
    `packing.documents_at_once`, each its number of tokens, and 0 and the end of each of its documents (N + 1,) int32.
    `attention_mask` (B, T) is made only where it is requested.
    """

    def __init__(
        self, pad_token_id: int, *, length: int | None = None, rows: int | None = None, attention_mask: bool = False
    ) -> None:
        """Set the shape of batches.

        Args:
            pad_token_id: token of the padding.
            length: T of every batch; None: the length of a batch's longest row.
            rows: B of every batch, where missing rows are padding; None: the number of rows given.
            attention_mask: whether batches have an attention mask.
        """
        self.pad_token_id = pad_token_id
        self.length = length
        self.rows = rows
        self.attention_mask = attention_mask

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return the batch of rows with `input_ids`, `labels` and, where they are packed, `documents`."""
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        shape = (self.rows or len(rows), self.length or max(lengths))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[number, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[number, :length] = torch.as_tensor(row["labels"], dtype=torch.int64)
        batch: Batch = {
            "input_ids": input_ids,
            "labels": labels,
            "loss_positions": labels.flatten().ne(IGNORED_LABEL).nonzero().flatten() - 1,
            "real_tokens": sum(lengths),
        }
        if "conversation" in rows[0]:
            batch["conversations"] = [row["conversation"] for row in rows]
        if "documents" in rows[0]:
            documents = [*(row["documents"] for row in rows), *[[]] * (shape[0] - len(rows))]
            batch["position_ids"] = torch.stack([_positions(parts, shape[1]) for parts in documents])
            batch["document_groups"] = _document_groups(batch["position_ids"])
        if self.attention_mask:
            unmasked = torch.tensor([*lengths, *[1] * (shape[0] - len(rows))])  # a wholly masked row would give NaN
            batch["attention_mask"] = (torch.arange(shape[1]) < unmasked[:, None]).long()
        return batch


def _document_groups(position_ids: torch.Tensor) -> DocumentGroups:
    """Return the `document_groups` of a batch with these positions (B, T)."""
    import torch

    starts = (position_ids.flatten() == 0).nonzero().flatten().int()
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    size, groups = documents_at_once(*position_ids.shape), []
    for first in range(0, len(starts), size):
        group = ends[first : first + size + 1] - ends[first]
        groups.append((int(group[-1]), group))
    return tuple(groups)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a tensor of a batch on a device, or a tuple with its tensors there; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(on_device(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


def _positions(documents: Sequence[int], length: int) -> torch.Tensor:
    """Return the positions (T,) of a row of documents; the padding counts as one more document."""
    import torch

    padding = length - sum(documents)
    return torch.cat([torch.arange(part) for part in (*documents, padding)])
