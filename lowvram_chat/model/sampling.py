"""Sampling settings, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_chat.errors import UsageError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Logits divided by less overflow in half precision; divided by more, all tokens are equally likely."""


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
        """Check the types and ranges."""
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise UsageError(f"{name}: {value!r} is not a number. Give a number, such as 0.7.")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise UsageError(
                f"temperature: {self.temperature} is neither 0 nor from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}. Give 0 "
                "(greedy) or a number in that range."
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: {self.top_p} is not in (0, 1]. Give 0.9, or 1 for all tokens.")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens: {self.max_new_tokens!r} is not a whole number above 0. Give the maximum length of an answer."
            )


def check_seed(seed: int | None) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        UsageError: it is not a whole number from 0 to 2**63 - 1.
    """
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise UsageError(f"seed: {seed!r} is not a whole number from 0 to 2**63 - 1. Give a smaller one.")
