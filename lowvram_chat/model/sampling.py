"""Sampling settings, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_chat.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UsageError: a setting is out of its range.
    """

    temperature: float = 0.7
    """0 is greedy decoding."""
    top_p: float = 0.9
    """Nucleus sampling: the smallest set of tokens with this probability; 1 is all tokens."""
    max_new_tokens: int = 200
    """Maximum length of an answer, tokens."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperature < 0:
            raise UsageError(f"temperature: {self.temperature} is below 0. Give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: {self.top_p} is not in (0, 1]. Give 0.9, or 1 for all tokens.")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {self.max_new_tokens} is below 1. Give the maximum length of an answer.")
