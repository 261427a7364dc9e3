"""Reads raw rows into rendered conversations: each row is used as it says, or has a problem."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowvram_chat.data.conversation import Conversation
from lowvram_chat.data.formats import READERS, RawFields, detect_format, missing_columns, unused_columns
from lowvram_chat.data.known_datasets import refuse_bad_labels, refuse_pairs
from lowvram_chat.data.markup import markup_of
from lowvram_chat.data.raw_rows import BadRow, RawRow
from lowvram_chat.data.render import Rendered, Renderer
from lowvram_chat.data.sources import Part, Source
from lowvram_chat.data.template_text import check_encodable
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
