"""Reads a source: which rows are conversations, what is wrong with the others, and the token rows that come of them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lowvram_chat.data.encode import Encoder
from lowvram_chat.data.formats import FORMATS, Conversation, detect_format
from lowvram_chat.data.rows import TokenRow, cut_to_length
from lowvram_chat.data.sources import BadRow, Source
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LISTED_BAD_ROWS = 10
"""Bad rows that are named."""


@dataclass
class Facts:
    """What became of a source: counts for the log, the run folder and the model card."""

    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row."""
    shortened: int = 0
    """Conversations that were longer than `max_length` (cut off, or split into windows)."""
    without_loss: int = 0
    """Conversations left out because no token that carries loss is within `max_length`."""
    special_tokens_removed: int = 0
    """Conversations whose text spelled out one of the tokenizer's special tokens."""
    bad_rows: int = 0
    bad_examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _ReadRow:
    """A raw row, read: a conversation, or why it is none."""

    where: str
    conversation: Conversation | None = None
    problem: str = ""
    cleaned: bool = False
    """Whether special tokens were removed."""


class Reader:
    """Reads a source and makes rows of it, counting into `facts`; can go on from the state of an earlier one."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        limit: int | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.source, self.data, self.limit = source, data, limit
        self.special_tokens = tokenizer.all_special_tokens
        self.encode = Encoder(tokenizer, data.loss_on, data.max_length if data.overflow == "truncate" else None)
        self.facts = Facts(**state["facts"]) if state else Facts()
        self.raw_rows: int = state["raw_rows"] if state else 0
        self.format: str | None = state["format"] if state else data.format

    def state(self) -> dict[str, Any]:
        """Return where the reader is, as JSON."""
        return {"raw_rows": self.raw_rows, "format": self.format, "facts": asdict(self.facts)}

    def rows(self) -> Iterator[tuple[int, list[TokenRow]]]:
        """Yield each conversation's number and its rows."""
        waiting: deque[_ReadRow] = deque()  # read ahead of what is encoded, in order
        conversations = self._conversations(waiting)
        for tokens, labels in self.encode(conversations):
            while (read := waiting.popleft()).conversation is None:
                self._count_bad(read)
            self.raw_rows += 1
            self.facts.special_tokens_removed += read.cleaned
            self.facts.conversations += 1
            yield self.facts.conversations - 1, self._rows_of(tokens, labels)
        for read in waiting:
            self._count_bad(read)

    def _rows_of(self, tokens: list[int], labels: list[int]) -> list[TokenRow]:
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

    def _count_bad(self, read: _ReadRow) -> None:
        self.raw_rows += 1
        self.facts.bad_rows += 1
        if len(self.facts.bad_examples) < MAX_LISTED_BAD_ROWS:
            self.facts.bad_examples.append(f"{read.where}: {read.problem}")

    def _conversations(self, waiting: deque[_ReadRow]) -> Iterator[Conversation]:
        """Yield the conversations that can be used, and append all that was read to `waiting`."""
        good, bad = self.facts.conversations, self.facts.bad_rows
        for where, raw in itertools.islice(self.source.rows(), self.raw_rows, None):
            if good == self.limit or (bad > self.data.max_bad_rows and bad >= MAX_LISTED_BAD_ROWS):
                return  # enough, or too many that cannot be used
            read = self._read(where, raw)
            waiting.append(read)
            if read.conversation is None:
                bad += 1
            else:
                good += 1
                yield read.conversation

    def _read(self, where: str, raw: Any) -> _ReadRow:
        try:
            if isinstance(raw, BadRow):
                raise ValueError(raw.reason)
            self.format = self.format or detect_format(raw, where)
            kind = FORMATS[self.format]
            if self.data.loss_on == "assistant" and not kind.has_roles:
                raise DataError(
                    f"{where}: the format {self.format} has no assistant turns to learn from. Set data.loss_on=all."
                )
            conversation = kind.read(raw)
            cleaned = _clean(conversation, self.special_tokens)
        except DataError:  # a ValueError too, but about the whole source
            raise
        except ValueError as error:
            return _ReadRow(where, problem=str(error))
        return _ReadRow(where, cleaned, cleaned=cleaned is not conversation)


def _clean(conversation: Conversation, special_tokens: list[str]) -> Conversation:
    """Return the conversation without spelled-out special tokens: an EOS inside a text would teach a false end.

    Raises:
        ValueError: nothing is left of a text, or it is no text that can be encoded.
    """
    texts = [conversation.text, *(message["content"] for message in conversation.messages)]
    cleaned = [_without(text, special_tokens) for text in texts]
    if not all(cleaned[1:] if conversation.messages else cleaned):
        raise ValueError("a message is nothing but special tokens")
    if cleaned == texts:
        return conversation
    contents = zip(conversation.messages, cleaned[1:], strict=True)
    messages = tuple({**message, "content": content} for message, content in contents)
    return Conversation(messages=messages, text=cleaned[0], ends=conversation.ends)


def _without(text: str, special_tokens: list[str]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair: not text that UTF-8 can hold") from None
    while any(token in text for token in special_tokens):  # removing one can make another
        for token in special_tokens:
            text = text.replace(token, "").strip()
    return text
