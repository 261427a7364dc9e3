"""Packs several conversations into each row, with the best-fit decreasing method; each conversation is one document.

TRL's `bfd` packing flattens a batch into one row, which without FlashAttention needs a mask of (B * T)^2 elements. Here a
batch stays (B, T): positions restart with each document, and attention is computed within documents only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)


def documents_at_once(rows: int, length: int) -> int:
    """Return how many documents of a packed batch (rows, length) attention on a graphics card takes at once, at most.

    Its buffers grow by 128 rows of fp32 heads with each document, and a plan must hold whatever the data are. More documents are
    taken in groups of this number, one group after the other.
    """
    return max(8, rows * (length // 64))


def best_fit_decreasing(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Return bins of indices into `lengths`, each of at most `capacity`.

    Items are placed in order of decreasing length, each into the fullest bin that still has space for it. The amounts of
    space left in the bins are the bits of one integer, so that a shift finds the smallest sufficient one: 200,000 rows take
    half a second.

    Source: Johnson, "Near-optimal bin packing algorithms" (1973).
    """
    sizes = list(lengths)
    bins: list[list[int]] = []
    bins_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit n is set where some bin has space for exactly n more
    for item in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[item]
        sufficient = spaces >> size << size
        if sufficient:
            space = (sufficient & -sufficient).bit_length() - 1
            bin_number = bins_by_space[space].pop()
            if not bins_by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, bin_number = capacity, len(bins)
            bins.append([])
        bins[bin_number].append(item)
        left = space - size
        if left:
            bins_by_space[left].append(bin_number)
            spaces |= 1 << left
    return bins


class JoinDocuments:
    """Builds packed rows from the numbers of their documents when the rows are read. It can be pickled."""

    def __init__(self, rows: datasets.Dataset) -> None:
        """Keep the rows that the documents are read from."""
        self.rows = rows.select_columns(["input_ids", "labels"]).with_format("numpy")

    def __call__(self, batch: Mapping[str, list[list[int]]]) -> dict[str, list[object]]:
        """Return `input_ids` (T,), `labels` (T,) and the lengths of the `documents` of each row."""
        import numpy

        parts = [self.rows[documents] for documents in batch["rows"]]
        return {
            "input_ids": [numpy.concatenate(list(part["input_ids"])) for part in parts],
            "labels": [numpy.concatenate(list(part["labels"])) for part in parts],
            "documents": [[len(tokens) for tokens in part["input_ids"]] for part in parts],
        }


def pack_rows(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Return packed rows: columns `input_ids` (T,), `labels` (T,), `documents` (their lengths) and `length` (T).

    No tokens are copied here: a packed row is assembled from its documents each time it is read.
    """
    import datasets

    lengths = list(rows["length"][:])
    bins = best_fit_decreasing(lengths, max_length)
    filled = [sum(lengths[item] for item in items) for items in bins]
    log.info(
        "packed: %s rows into %s of %d tokens, %.1f %% full",
        f"{len(rows):,}",
        f"{len(bins):,}",
        max_length,
        100 * sum(filled) / (len(bins) * max_length),
    )
    packed = datasets.Dataset.from_dict({"rows": bins, "length": filled})
    return packed.with_transform(JoinDocuments(rows), columns=["rows"], output_all_columns=True)
