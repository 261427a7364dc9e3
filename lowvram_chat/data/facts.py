"""Counts of what a source of conversations held, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lowvram_chat.recipe.schema import Data

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
