"""Reads a source row by row: turns usable rows into token rows and counts what became of all of them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

from lowvram_chat.data.conversation import Conversation
from lowvram_chat.data.encode import Encoded, Encoder
from lowvram_chat.data.formats import READERS, RawFields, detect_format, missing_columns, unused_columns
from lowvram_chat.data.known_datasets import refuse_bad_labels, refuse_pairs
from lowvram_chat.data.markup import markup_of
from lowvram_chat.data.parsers import BadRow, RawRow
from lowvram_chat.data.render import Rendered, Renderer
from lowvram_chat.data.rows import TokenRow, cut_to_length
from lowvram_chat.data.sources import Part, Source
from lowvram_chat.data.template_text import check_encodable
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LISTED_BAD_ROWS = 10
"""Number of unusable rows that messages list."""


@dataclass
class Facts:
    """Counts of what a source held, for the log, the run folder and the model card."""

    conversations: int = 0
    rows: int = 0
    """Token rows made of the conversations."""
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row."""
    characters: int = 0
    """Length of the conversations' text."""
    characters_cut: int = 0
    """Part of it that is dropped, because it is beyond `max_length`."""
    shortened: int = 0
    """Conversations longer than `max_length`, which were truncated or split."""
    without_loss: int = 0
    """Conversations left out because none of their tokens within `max_length` carries loss."""
    duplicates: int = 0
    """Conversations whose text an earlier one has, too."""
    special_tokens_removed: int = 0
    """Conversations whose text contained a special token of the tokenizer or of the chat template."""
    spelled_turns: int = 0
    """Conversations whose text contains the beginning of a turn, which the model cannot tell from a real one."""
    columns_not_used: dict[str, int] = field(default_factory=dict)
    """Column, or `messages.key` of a message, that the format does not use -> the rows in which it holds something."""
    bad_rows: int = 0
    """Rows that cannot be used."""
    bad_examples: list[str] = field(default_factory=list)
    """Place and problem of the first unusable rows, at most `MAX_LISTED_BAD_ROWS`."""

    @property
    def share_cut(self) -> float:
        """Share of the text that is dropped, from 0 to 1."""
        return self.characters_cut / self.characters if self.characters else 0.0

    @property
    def rows_read(self) -> int:
        """Rows of the source that were read, whether they can be used or not."""
        return self.conversations + self.bad_rows

    def allowed_bad_rows(self, data: Data) -> int:
        """Return the number of unusable rows that `data.max_bad_rows` allows; a share is one of the rows read."""
        limit = data.max_bad_rows
        return limit if isinstance(limit, int) else math.floor(limit * self.rows_read + 1e-9)


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
class ReadRow:
    """The result of reading one raw row: a rendered conversation, or the problem that makes it unusable."""

    where: str
    rendered: Rendered | None = None
    problem: str = ""
    special_tokens_removed: bool = False
    spells_turn: bool = False
    not_used: tuple[str, ...] = ()
    """Columns and message keys that hold something and are not used."""
    part: int = 0
    """Number of the file or dataset that the row is in."""
    format: str | None = None
    """Format of that file; None where no row could be parsed yet."""

    @property
    def digest(self) -> int:
        """Digest of the text, of 63 bits; equal conversations have equal digests."""
        text = self.rendered.text if self.rendered else ""
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


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


def format_of_part(part: Part, row: RawFields, where: str, named: str | None) -> str:
    """Return the format of a file or dataset: `named` where it is given, or else the one that its first row has.

    A set that comes with the package keeps its own format, so that it can be held out beside any training source.

    Raises:
        DataError: no format has the columns of the row.
    """
    if named is not None and not (part.is_builtin and any(c not in row for c in FORMATS[named].columns)):
        return named
    return detect_format(row, where)


class RowReader:
    """Reads raw rows into rendered conversations; it remembers the format of the file that is being read."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        """Set up a reader of the rows of a source."""
        self.source, self.data = source, data
        self.markup = markup_of(tokenizer)
        self.render = Renderer(tokenizer, data.loss_on)
        self.part = 0
        self.format: str | None = None

    def rows(self, start: int) -> Iterator[ReadRow]:
        """Yield the rows of the source, from the one with this number.

        Raises:
            DataError: the whole source cannot be used: no format fits, the format has no roles for the loss, or the rows are
                not meant for supervised fine-tuning.
        """
        for part, where, raw in itertools.islice(self.source.numbered_rows(), start, None):
            if part != self.part:
                self.part, self.format = part, None
            row = self._read(where, raw)
            yield replace(row, part=part, format=self.format)

    def _read(self, where: str, raw: RawRow) -> ReadRow:
        if isinstance(raw, BadRow):
            return ReadRow(where, problem=raw.reason)
        refuse_pairs(raw, where)
        if self.format is None:
            self.format = format_of_part(self.source.parts[self.part], raw, where, self.data.format)
        kind = FORMATS[self.format]
        if self.data.loss_on == "assistant" and not kind.has_roles:
            raise DataError(
                f"{where}: the format {self.format} has no assistant turns to learn from. Set data.loss_on=all."
            )
        if kind.has_roles:  # texts without roles have labels of other kinds
            refuse_bad_labels(raw, where)
        problem = missing_columns(raw, self.format, given=self.data.format is not None)
        if problem:
            return ReadRow(where, problem=problem)
        try:
            return self._rendered(where, raw, READERS[self.format](raw), self.format)
        except ValueError as error:
            return ReadRow(where, problem=str(error))

    def _rendered(self, where: str, raw: RawFields, conversation: Conversation, name: str) -> ReadRow:
        """Return a usable row.

        Raises:
            ValueError: a text cannot be used, or the template refuses the conversation.
        """
        markup = self.markup
        texts = [conversation.text, *(message["content"] for message in conversation.messages)]
        for text in texts:
            check_encodable(text)
        cleaned = [markup.without_special_tokens(text) for text in texts]
        if any(text.strip() and not clean.strip() for text, clean in zip(texts, cleaned, strict=True)):
            raise ValueError("a message consists of special tokens only")
        if cleaned != texts:  # an EOS token in a text would teach the model to stop early
            contents = zip(conversation.messages, cleaned[1:], strict=True)
            messages = tuple({**message, "content": content} for message, content in contents)
            conversation = replace(conversation, messages=messages, text=cleaned[0])
        return ReadRow(
            where,
            rendered=self.render(conversation),
            special_tokens_removed=cleaned != texts,
            spells_turn=any(markup.spells_turn(text) for text in cleaned[1:]),
            not_used=(*unused_columns(raw, name), *conversation.unused),
        )


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
