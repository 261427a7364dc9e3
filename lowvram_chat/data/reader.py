"""Reads a source: turns usable rows into token rows and counts what became of all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from lowvram_chat.data.encode import Encoded, Encoder
from lowvram_chat.data.facts import MAX_LISTED_BAD_ROWS, Facts
from lowvram_chat.data.render import Rendered
from lowvram_chat.data.row_reader import ReadRow, RowReader
from lowvram_chat.data.rows import TokenRow, cut_to_length
from lowvram_chat.data.sources import Source
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReaderState(TypedDict):
    """Progress of a reader, as JSON holds it."""

    raw_rows: int
    """Rows of the source that were read."""
    part: int
    """Number of the file or dataset of the last row."""
    format: str | None
    """Format of that file."""
    facts: dict[str, Any]
    """The fields of `Facts`."""


@dataclass(frozen=True)
class ReadConversation:
    """A usable row and its token rows."""

    number: int
    """Number of the conversation in the source, from 0."""
    row: ReadRow
    length: int
    """Number of its tokens; of a conversation that is cut, perhaps only of its beginning."""
    token_rows: list[TokenRow]
    """The rows that carry loss."""


class Reader:
    """Reads the token rows of a source and counts into `facts`; it can continue from the state of an earlier reader."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        limit: int | None,
        state: ReaderState | None,
    ) -> None:
        """Set up a reader of at most `limit` conversations (None: all), which continues from `state` (None: the start)."""
        self.data, self.limit = data, limit
        self.encode = Encoder(tokenizer, data.max_length if data.overflow == "truncate" else None)
        self.row_reader = RowReader(source, tokenizer, data)
        self.facts = Facts(**state["facts"]) if state else Facts()
        self.raw_rows = state["raw_rows"] if state else 0
        self.part: int = state["part"] if state else 0
        self.format = state["format"] if state else None
        self.row_reader.part, self.row_reader.format = self.part, self.format

    def state(self) -> ReaderState:
        """Return the progress, from which another reader can continue."""
        return {"raw_rows": self.raw_rows, "part": self.part, "format": self.format, "facts": asdict(self.facts)}

    def conversations(self) -> Iterator[ReadConversation]:
        """Yield each usable conversation with its token rows.

        Once more rows are unusable than may be skipped, no further conversation is yielded: the rest is read to count.
        """
        read_ahead: deque[ReadRow] = deque()  # rows that were read and whose encoding is still to come, in order
        for encoded in self.encode(self._rendered(read_ahead)):
            while (row := read_ahead.popleft()).rendered is None:
                self._count_bad_row(row)
            number = self._count_conversation(row)
            yield ReadConversation(number, row, len(encoded.ids), self._token_rows(row, encoded))
        for row in read_ahead:
            if row.rendered is None:
                self._count_bad_row(row)
            else:
                self._count_conversation(row)

    def _rendered(self, read_ahead: deque[ReadRow]) -> Iterator[Rendered]:
        """Yield the usable rows' texts, and append every row that was read to `read_ahead`; stop at the limit."""
        usable, bad = self.facts.conversations, self.facts.bad_rows
        rows = self.row_reader.rows(self.raw_rows)
        while usable != self.limit and (row := next(rows, None)) is not None:
            too_many = isinstance(self.data.max_bad_rows, int) and bad > self.data.max_bad_rows
            if row.rendered is None:
                bad += 1
            else:
                usable += 1
                if not too_many:
                    read_ahead.append(row)
                    yield row.rendered
                    continue
                row = replace(row, rendered=Rendered(""))  # only counted, so its text need not be kept
            read_ahead.append(row)

    def _count_conversation(self, row: ReadRow) -> int:
        """Count a usable row and return the number of its conversation."""
        facts = self.facts
        self._count_row(row)
        facts.conversations += 1
        facts.special_tokens_removed += row.special_tokens_removed
        facts.spelled_turns += row.spells_turn
        for name in row.not_used:
            facts.columns_not_used[name] = facts.columns_not_used.get(name, 0) + 1
        return facts.conversations - 1

    def _token_rows(self, row: ReadRow, encoded: Encoded) -> list[TokenRow]:
        """Return the rows of a conversation that carry loss, and count them."""
        facts, data = self.facts, self.data
        windows = cut_to_length(encoded.ids, encoded.labels, data.max_length, data.overflow)
        rows = [window for window in windows if window.loss_tokens]
        facts.characters += len(row.rendered.text) if row.rendered else 0
        facts.characters_cut += encoded.characters_cut
        facts.shortened += len(encoded.ids) > data.max_length
        facts.without_loss += not rows
        facts.rows += len(rows)
        for token_row in rows:
            facts.tokens += len(token_row.input_ids)
            facts.loss_tokens += token_row.loss_tokens
            facts.longest = max(facts.longest, len(token_row.input_ids))
        return rows

    def _count_row(self, row: ReadRow) -> None:
        self.raw_rows += 1
        self.part, self.format = row.part, row.format

    def _count_bad_row(self, row: ReadRow) -> None:
        self._count_row(row)
        self.facts.bad_rows += 1
        if len(self.facts.bad_examples) < MAX_LISTED_BAD_ROWS:
            self.facts.bad_examples.append(f"{row.where}: {row.problem}")
