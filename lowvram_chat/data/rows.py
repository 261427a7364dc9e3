"""Token rows: cut to length, split into held-out and training, and collated into rectangular batches.

A row's padding stands on the right and the model is causal, so no real token ever sees it: batches carry no attention
mask, and attention runs its plain causal kernel. Packed rows carry positions that restart with each document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

IGNORED_LABEL = -100
"""Label of a token that carries no loss (torch.nn.functional.cross_entropy's default)."""

MODEL_INPUTS = ("input_ids", "labels", "loss_positions", "position_ids", "attention_mask")
"""What of a batch the model is given, where the batch has it."""


@dataclass(frozen=True)
class TokenRow:
    """Tokens that stand together: ids and labels of equal length; the first label is always ignored."""

    input_ids: list[int]
    labels: list[int]

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL)


def cut_to_length(tokens: list[int], labels: list[int], max_length: int, overflow: str) -> Iterator[TokenRow]:
    """Yield a conversation's rows: the first `max_length` tokens, or (`split`) windows that together hold all.

    Windows overlap by one token, so that the first label of a window is predicted by the last one of the window before
    and none is lost: a row's own first token has nothing before it to be predicted from.
    """
    ends = range(0, max(1, len(tokens) - 1), max_length - 1) if overflow == "split" else range(1)
    for start in ends:
        part = slice(start, start + max_length)
        yield TokenRow(tokens[part], [IGNORED_LABEL, *labels[part][1:]])


def split_by_conversation(
    rows: datasets.Dataset, conversations: int, fraction: float, seed: int, limit: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (training, held-out) rows: a seeded share of the source's `conversations`, at most `limit` of them held out.

    The choice depends on a conversation's number alone, not on its length or loss, so that the same ones are held out
    whatever the rows are made for; all windows of a conversation stand on the same side.
    """
    import numpy

    of_row = numpy.asarray(rows["conversation"][:])
    order = numpy.random.default_rng(seed).permutation(conversations)
    chosen = order[: max(1, round(fraction * conversations))]
    is_chosen = numpy.isin(of_row, chosen)
    scored = is_chosen if limit is None else numpy.isin(of_row, numpy.unique(of_row[is_chosen])[:limit])
    return rows.select(numpy.flatnonzero(~is_chosen)), rows.select(numpy.flatnonzero(scored))


class Collator:
    """Rows become a batch: right-padded (B, T) int64 tensors, and where its loss is.

    `loss_positions` (N,) are the places, in the flattened (B * T,) batch, of the tokens that predict a labelled one. They
    are found here, on the host, so that the loss needs no device synchronisation. `position_ids` (B, T) only come with
    packed rows, `attention_mask` (B, T) only where it is asked for.
    """

    def __init__(
        self, pad_token_id: int, *, length: int | None = None, rows: int | None = None, attention_mask: bool = False
    ) -> None:
        """Keep what batches look like.

        `length` and `rows` are those of every batch, the missing rows of an epoch's last one being padding; None: as long
        as a batch's longest row, and as many rows as there are.
        """
        self.pad_token_id = pad_token_id
        self.length = length
        self.rows = rows
        self.attention_mask = attention_mask

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        shape = (self.rows or len(rows), self.length or max(lengths))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[number, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[number, :length] = torch.as_tensor(row["labels"], dtype=torch.int64)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "loss_positions": labels.flatten().ne(IGNORED_LABEL).nonzero().flatten() - 1,
            "real_tokens": sum(lengths),
        }
        if "documents" in rows[0]:
            documents = [row["documents"] for row in rows] + [[]] * (shape[0] - len(rows))
            batch["position_ids"] = torch.stack([_positions(parts, shape[1]) for parts in documents])
        if self.attention_mask:
            seen = torch.tensor([*lengths, *[1] * (shape[0] - len(rows))])  # a row that sees nothing would be NaN
            batch["attention_mask"] = (torch.arange(shape[1]) < seen[:, None]).long()
        return batch


def _positions(documents: Sequence[int], length: int) -> Any:
    """Return the positions (T,) of a row of documents; its padding is one more document, which nobody sees."""
    import torch

    rest = length - sum(documents)
    return torch.cat([torch.arange(part) for part in (*documents, rest)])
