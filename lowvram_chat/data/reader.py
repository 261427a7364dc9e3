"""Reads a source row by row: turns usable rows into token rows and counts what became of all of them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from lowvram_chat.data.encode import Encoder
from lowvram_chat.data.formats import READERS, Conversation, detect_format
from lowvram_chat.data.rows import TokenRow, cut_to_length
from lowvram_chat.data.sources import BadRow, RawRow, Source
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
    shortened: int = 0
    """Conversations longer than `max_length`, which were truncated or split."""
    without_loss: int = 0
    """Conversations left out because none of their tokens within `max_length` carries loss."""
    special_tokens_removed: int = 0
    """Conversations whose text contained one of the tokenizer's special tokens."""
    bad_rows: int = 0
    """Rows that cannot be used."""
    bad_examples: list[str] = field(default_factory=list)
    """Place and problem of the first unusable rows, at most `MAX_LISTED_BAD_ROWS`."""


class ReaderState(TypedDict):
    """Progress of a reader, as JSON holds it."""

    raw_rows: int
    """Rows of the source that were read."""
    format: str | None
    facts: dict[str, Any]
    """The fields of `Facts`."""


@dataclass(frozen=True)
class _ReadRow:
    """The result of reading one raw row: a conversation, or the problem that makes it unusable."""

    where: str
    conversation: Conversation | None = None
    problem: str = ""
    cleaned: bool = False
    """Whether special tokens were removed."""


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
        self.source, self.data, self.limit = source, data, limit
        self.special_tokens = tokenizer.all_special_tokens
        self.encode = Encoder(tokenizer, data.loss_on, data.max_length if data.overflow == "truncate" else None)
        self.facts = Facts(**state["facts"]) if state else Facts()
        self.raw_rows = state["raw_rows"] if state else 0
        self.format = state["format"] if state else data.format

    def state(self) -> ReaderState:
        """Return the progress, from which another reader can continue."""
        return {"raw_rows": self.raw_rows, "format": self.format, "facts": asdict(self.facts)}

    def rows(self) -> Iterator[tuple[int, list[TokenRow]]]:
        """Yield the number and the token rows of each conversation."""
        read_ahead: deque[_ReadRow] = deque()  # rows that were read and whose encoding is still to come, in order
        conversations = self._conversations(read_ahead)
        for tokens, labels in self.encode(conversations):
            while (row := read_ahead.popleft()).conversation is None:
                self._count_bad_row(row)
            self.raw_rows += 1
            self.facts.special_tokens_removed += row.cleaned
            self.facts.conversations += 1
            yield self.facts.conversations - 1, self._token_rows(tokens, labels)
        for row in read_ahead:
            self._count_bad_row(row)

    def _token_rows(self, tokens: list[int], labels: list[int]) -> list[TokenRow]:
        """Return the rows of a conversation that carry loss, and count them."""
        facts, data = self.facts, self.data
        facts.shortened += len(tokens) > data.max_length
        rows = [row for row in cut_to_length(tokens, labels, data.max_length, data.overflow) if row.loss_tokens]
        facts.without_loss += not rows
        facts.rows += len(rows)
        for row in rows:
            facts.tokens += len(row.input_ids)
            facts.loss_tokens += row.loss_tokens
            facts.longest = max(facts.longest, len(row.input_ids))
        return rows

    def _count_bad_row(self, row: _ReadRow) -> None:
        self.raw_rows += 1
        self.facts.bad_rows += 1
        if len(self.facts.bad_examples) < MAX_LISTED_BAD_ROWS:
            self.facts.bad_examples.append(f"{row.where}: {row.problem}")

    def _conversations(self, read_ahead: deque[_ReadRow]) -> Iterator[Conversation]:
        """Yield the usable conversations, and append every row that was read to `read_ahead`.

        Stops at the limit, and where more rows are unusable than may be skipped or listed.
        """
        usable, bad = self.facts.conversations, self.facts.bad_rows
        for where, raw in itertools.islice(self.source.rows(), self.raw_rows, None):
            if usable == self.limit or (bad > self.data.max_bad_rows and bad >= MAX_LISTED_BAD_ROWS):
                return
            row = self._read_row(where, raw)
            read_ahead.append(row)
            if row.conversation is None:
                bad += 1
            else:
                usable += 1
                yield row.conversation

    def _read_row(self, where: str, raw: RawRow) -> _ReadRow:
        """Return the conversation of a raw row, or its problem.

        Raises:
            DataError: the whole source cannot be used: no format fits, or the format has no roles for the loss.
        """
        if isinstance(raw, BadRow):
            return _ReadRow(where, problem=raw.reason)
        if self.format is None:
            self.format = detect_format(raw, where)
        if self.data.loss_on == "assistant" and not FORMATS[self.format].has_roles:
            raise DataError(
                f"{where}: the format {self.format} has no assistant turns to learn from. Set data.loss_on=all."
            )
        try:
            conversation = READERS[self.format](raw)
            cleaned = _remove_special_tokens(conversation, self.special_tokens)
        except ValueError as error:
            return _ReadRow(where, problem=str(error))
        return _ReadRow(where, cleaned, cleaned=cleaned is not conversation)


def _remove_special_tokens(conversation: Conversation, special_tokens: list[str]) -> Conversation:
    """Return the conversation without special tokens in its text: an EOS token there would teach the model to stop early.

    Raises:
        ValueError: a text is empty without them, or cannot be encoded in UTF-8.
    """
    texts = [conversation.text, *(message["content"] for message in conversation.messages)]
    cleaned = [_text_without(text, special_tokens) for text in texts]
    if not all(cleaned[1:] if conversation.messages else cleaned):
        raise ValueError("a message consists of special tokens only")
    if cleaned == texts:
        return conversation
    contents = zip(conversation.messages, cleaned[1:], strict=True)
    messages = tuple({**message, "content": content} for message, content in contents)
    return Conversation(messages=messages, text=cleaned[0], append_eos=conversation.append_eos)


def _text_without(text: str, special_tokens: list[str]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which UTF-8 cannot encode") from None
    while any(token in text for token in special_tokens):  # removing one token can form another
        for token in special_tokens:
            text = text.replace(token, "").strip()
    return text
