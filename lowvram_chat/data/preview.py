"""What would be trained: rows as the model sees them, and what became of everything else in a source."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowvram_chat.data.dataset import held_out_source
from lowvram_chat.data.facts import Facts
from lowvram_chat.data.reader import ReadConversation, Reader
from lowvram_chat.data.row_reader import ReadRow
from lowvram_chat.data.rows import IGNORED_LABEL, TokenRow, chosen_conversations
from lowvram_chat.data.sources import Source, open_source
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED_ROWS = 1000
"""Rows of a hub dataset that a preview reads at least."""
EVERY_ROW = 10**12
"""A `data.max_bad_rows` with which bad rows never end the reading."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row that all carry loss, or all do not."""

    text: str
    carries_loss: bool


@dataclass(frozen=True)
class PreviewRow:
    """A row as it is trained."""

    place: str
    """File and line."""
    pieces: tuple[Piece, ...]
    tokens: int
    loss_tokens: int

    @property
    def text(self) -> str:
        """The row's text, with its special tokens."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def trained(self) -> list[str]:
        """The pieces that carry loss."""
        return [piece.text for piece in self.pieces if piece.carries_loss]


@dataclass(frozen=True)
class Preview:
    """A source as it would be trained."""

    name: str
    rows: list[PreviewRow]
    """The first rows."""
    facts: Facts
    lengths: list[int]
    """Tokens of each conversation before it is cut, ascending."""
    max_length: int
    bad_rows_by_kind: dict[str, int]
    """Problem -> rows that have it, most frequent first."""
    in_both: int
    """Held-out conversations that are trained on, too; of a sample, those within it."""
    is_sample: bool
    """Whether only the first rows of a hub dataset were read."""

    @property
    def share_with_loss(self) -> float:
        """Share of the tokens that carry loss, from 0 to 1."""
        return self.facts.loss_tokens / self.facts.tokens if self.facts.tokens else 0.0

    def share_cut_at(self, max_length: int) -> float:
        """Return the share of the tokens that `data.overflow=truncate` drops at a maximum length, from 0 to 1."""
        total = sum(self.lengths)
        return sum(max(0, length - max_length) for length in self.lengths) / total if total else 0.0

    def rows_when_split(self, max_length: int) -> int:
        """Return the number of rows that `data.overflow=split` makes at a maximum length."""
        return sum(max(1, -(-(length - 1) // (max_length - 1))) for length in self.lengths)

    def histogram(self) -> dict[int, int]:
        """Return the number of conversations by length: largest length of each bin (powers of two) -> conversations."""
        bins = Counter(1 << max(3, (length - 1).bit_length()) for length in self.lengths)
        return {bound: bins[bound] for bound in sorted(bins)}


@dataclass
class _Readings:
    """What a reading of a source has seen."""

    rows: list[PreviewRow] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)


def make_preview(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, rows: int) -> Preview:
    """Return a preview of the training source of a data section, with its first `rows` rows.

    A hub dataset is read only as far as `SAMPLED_ROWS`, or `rows` if that is more.

    Raises:
        NotFoundError, DataError: the source as a whole cannot be read. Rows that cannot be used are counted.
    """
    sample = max(SAMPLED_ROWS, rows)
    source = open_source(data.source, split=data.split, subset=data.subset, sample=sample)
    everything = data.model_copy(update={"max_bad_rows": EVERY_ROW})
    reader = _WholeReader(source, tokenizer, everything, data.limit)
    seen = _Readings()
    for conversation in reader.conversations():
        seen.lengths.append(conversation.length)
        seen.digests.append(conversation.row.digest)
        missing = rows - len(seen.rows)
        seen.rows += [preview_row(tokenizer, conversation, row) for row in conversation.token_rows[: max(0, missing)]]
    reader.facts.duplicates = len(seen.digests) - len(set(seen.digests))
    return Preview(
        name=source.name,
        rows=seen.rows,
        facts=reader.facts,
        lengths=sorted(seen.lengths),
        max_length=data.max_length,
        bad_rows_by_kind=dict(reader.problems.most_common()),
        in_both=_count_in_both(data, tokenizer, seed, seen.digests, sample),
        is_sample=source.is_sample,
    )


class _WholeReader(Reader):
    """Encodes whole conversations, so that their lengths are known, and counts the kinds of problems."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> None:
        super().__init__(source, tokenizer, data, limit, None)
        self.encode.keep = None
        self.problems: Counter[str] = Counter()

    def _count_bad_row(self, row: ReadRow) -> None:
        super()._count_bad_row(row)
        self.problems[kind_of_problem(row.problem)] += 1


def kind_of_problem(problem: str) -> str:
    """Return a problem without its numbers and quoted words, so that rows with the same kind of problem count together."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", re.sub(r"\d+", "N", problem))


def _count_in_both(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, digests: Sequence[int], sample: int
) -> int:
    """Return the number of held-out conversations that are trained on, too."""
    if data.eval_fraction is not None:
        chosen = chosen_conversations(len(digests), data.eval_fraction, seed)
        trained = {digest for digest, is_chosen in zip(digests, chosen, strict=True) if not is_chosen}
        return sum(digest in trained for digest, is_chosen in zip(digests, chosen, strict=True) if is_chosen)
    if data.eval_source is None and data.eval_split is None:
        return 0
    source = held_out_source(data, sample=sample)
    reader = Reader(source, tokenizer, data.model_copy(update={"max_bad_rows": EVERY_ROW}), data.eval_limit, None)
    trained = set(digests)
    return sum(conversation.row.digest in trained for conversation in reader.conversations())


def preview_row(tokenizer: PreTrainedTokenizerBase, conversation: ReadConversation, row: TokenRow) -> PreviewRow:
    """Return a row as it is trained."""
    return PreviewRow(
        conversation.row.where, tuple(pieces_of(tokenizer, row)), tokens=len(row.input_ids), loss_tokens=row.loss_tokens
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> Iterator[Piece]:
    """Yield the pieces of a row with and without loss, in order."""
    pairs = zip(row.input_ids, row.labels, strict=True)
    for carries_loss, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        yield Piece(str(text), carries_loss)
