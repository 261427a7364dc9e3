"""Rows as files hold them, each with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BadRow:
    """A row that could not be parsed."""

    reason: str


RawRow = Mapping[str, object] | BadRow
PlacedRows = Iterator[tuple[str, RawRow]]
"""Pairs of a place, such as `chats.jsonl:3`, and the row that was read there."""

NOT_UTF8_ROW = BadRow("not UTF-8 text. Save the file as UTF-8")
