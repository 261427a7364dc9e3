"""What a chat template writes around messages: special tokens and the words that begin a turn.

A text that spells either of them would forge a turn or end an answer. In training data special tokens are removed, and texts
that spell a turn are counted. What a user types in a chat gets a space inside, so that it stays text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowvram_chat.data.conversation import KNOWN_ROLES
from lowvram_chat.data.template_text import render_text

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase

SENTINELS = ("QZXFIRSTQZX", "QZXSECONDQZX", "QZXTHIRDQZX")
"""Texts of the messages of a sample conversation, between which a template's own text is found."""
SAMPLE_ROLES = (
    *((first, second) for first in ("user", "assistant") for second in KNOWN_ROLES),
    *(("user", "assistant", third) for third in KNOWN_ROLES),
    ("system", "user", "assistant"),
)
"""Roles of the sample conversations; templates refuse some of them."""


MAX_NESTED = 20
"""Times that special tokens are removed from a text."""
BRACKETED = re.compile(r"[<\[{\uff1c].*[>\]}\uff1e]$", re.DOTALL)
"""Form of tokens such as <|im_end|>. Other added tokens are words, and a template may well write words."""


@dataclass(frozen=True)
class Markup:
    """The special tokens and turn markers of a tokenizer and its chat template."""

    special_tokens: tuple[str, ...]
    """Texts that the tokenizer turns into a special token, longest first."""
    turn_markers: tuple[str, ...]
    """Texts that begin a turn without a special token, such as `\\nassistant:` of the plain template."""

    normalizer: Normalizer | None = field(default=None, repr=False, compare=False)
    """What the tokenizer does to a text before it looks for tokens: lower case, compatibility forms, ..."""

    def without_special_tokens(self, text: str) -> str:
        """Return a text without special tokens. Where removing one forms another, that one is removed, too.

        Raises:
            ValueError: special tokens are nested beyond reason, or the tokenizer would make one of what is left.
        """
        for _ in range(MAX_NESTED):
            if not self._has_special_token(text):
                break
            for token in self.special_tokens:
                text = text.replace(token, "")
        else:
            raise ValueError("special tokens are nested in each other")
        self.check_normalized(text)
        return text

    @functools.cached_property
    def _first_characters(self) -> frozenset[str]:
        return frozenset(token[0] for token in self.special_tokens)

    def _has_special_token(self, text: str) -> bool:
        """Return whether a text contains a special token; most texts have none of their first characters."""
        may_have = any(character in text for character in self._first_characters)
        return may_have and any(token in text for token in self.special_tokens)

    def check_normalized(self, text: str) -> None:
        """Refuse a text that is a special token only once the tokenizer has normalised it.

        Raises:
            ValueError: with the token.
        """
        if self.normalizer is None:
            return
        normalized = self.normalizer.normalize_str(text)
        for token in self.special_tokens:
            if token in normalized or self.normalizer.normalize_str(token) in normalized:
                raise ValueError(f"the tokenizer turns a part of the text into the special token {token!r}")

    def spells_turn(self, text: str) -> bool:
        """Return whether a text contains the beginning of a turn."""
        return any(marker in text for marker in self.turn_markers)

    def as_plain_text(self, text: str) -> str:
        """Return a text with a space before the last character of each special token and turn marker, so that it is neither.

        A special token of one character has no inside and is removed.

        Raises:
            ValueError: as `check_normalized`.
        """
        for token in (*self.special_tokens, *self.turn_markers):
            while token in text:
                text = text.replace(token, f"{token[:-1]} {token[-1]}" if len(token) > 1 else "")
        self.check_normalized(text)
        return text


def markup_of(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return the markup of a tokenizer and its chat template, if it has one."""
    pieces = list(_template_pieces(tokenizer))
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
    bracketed = [token.content for token in added if BRACKETED.match(token.content)]
    written = {token for token in bracketed if any(token in text for texts in pieces for text in texts)}
    tokens = sorted((token for token in special | written if token.strip()), key=len, reverse=True)
    markers = dict.fromkeys(_turn_markers(pieces, tokens))
    return Markup(tuple(tokens), tuple(markers), tokenizer.backend_tokenizer.normalizer)


def _template_pieces(tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[str]]:
    """Yield what the template writes before, between and after the messages of the sample conversations it accepts."""
    if not tokenizer.chat_template:
        return
    for roles in SAMPLE_ROLES:
        messages = [{"role": role, "content": text} for role, text in zip(roles, SENTINELS, strict=False)]
        try:
            text = render_text(tokenizer, messages)
        except ValueError:
            continue
        yield re.split("|".join(SENTINELS), text)


def _turn_markers(pieces: Iterable[Sequence[str]], special_tokens: Sequence[str]) -> Iterator[str]:
    """Yield what stands between two messages where no special token is part of it: only then can a text spell it."""
    for texts in pieces:
        for header in texts[1:-1]:
            if len(header.strip()) > 1 and not any(token in header for token in special_tokens):
                yield header.rstrip()


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the BOS token if the tokenizer puts it before each text, as Llama's does; otherwise an empty text."""
    first = tokenizer("a")["input_ids"][:1]
    return str(tokenizer.bos_token) if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
