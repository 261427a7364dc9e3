"""Finds the assistant's words in a rendered conversation, each answer with the token that ends it.

A template may mark them with {% generation %}. Without marks they are found by rendering the conversation turn by turn: an
answer begins where the text that asks for it ends, and it ends with the first special token that the template writes after it.
Both ways the end token is part of the answer, because a model only stops if it learned to.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram_chat.data.conversation import Message
from lowvram_chat.data.markup import SENTINELS, markup_of
from lowvram_chat.data.template_text import Spans, marks_answers, render_marked, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = [{"role": "user", "content": SENTINELS[0]}, {"role": "assistant", "content": SENTINELS[1]}]
"""A conversation that every chat template accepts."""
PROBE = "QZXPROBEQZX"
"""An answer in place of a message's own, around which the template's text is found."""
CHANGED = "the chat template renders an answer differently from what it asks for"


class AnswerFinder:
    """Finds the answers in conversations under a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set up a finder for the tokenizer's present template."""
        self.tokenizer = tokenizer
        self.is_marked = bool(tokenizer.chat_template) and marks_answers(tokenizer)
        special = markup_of(tokenizer).special_tokens
        one = "|".join(map(re.escape, special)) or r"(?!)"
        self.special_token, self.special_tokens = re.compile(one), re.compile(f"(?:{one})+")
        self.end_token = self._end_token_of_sample() if self.is_marked else ""

    def __call__(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """Return the text of messages and the span of each answer, with the token that ends it.

        Raises:
            ValueError: the template refuses the messages, or the answers cannot be found in its text.
        """
        if not self.is_marked:
            return self._by_turns(messages)
        text, spans = render_marked(self.tokenizer, messages)
        return text, [(first, self._after_end_token(text, end)) for first, end in spans]

    def _after_end_token(self, text: str, end: int) -> int:
        """Return the end of a marked answer; an end token that stands directly after the marks belongs to it."""
        return end + len(self.end_token) if self.end_token and text.startswith(self.end_token, end) else end

    def _end_token_of_sample(self) -> str:
        """Return the special token that the template writes directly after a marked answer; empty if there is none."""
        try:
            text, spans = render_marked(self.tokenizer, SAMPLE)
        except ValueError:
            return ""
        found = self.special_token.match(text, spans[-1][1]) if spans else None
        return found[0] if found else ""

    def _by_turns(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """Return the text and the answers of messages under a template without marks."""
        text = render_text(self.tokenizer, messages)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._answer(text, messages, number) for number in numbers]
        if any(earlier[1] > later[0] for earlier, later in itertools.pairwise(spans)):
            raise ValueError(CHANGED)
        return text, spans

    def _answer(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int]:
        """Return the span of one answer in the text of all messages."""
        before, answer = messages[:number], messages[number]
        prompt = render_text(self.tokenizer, before, add_generation_prompt=True)
        alone = render_text(self.tokenizer, [*before, answer])
        pieces = render_text(self.tokenizer, [*before, {**answer, "content": PROBE}]).split(PROBE)
        if not text.startswith(prompt):
            raise ValueError(f"{CHANGED}: what stands before message {number + 1} changes once it is answered")
        if len(pieces) != 2 or not (pieces[0].startswith(prompt) and alone.startswith(prompt)):
            raise ValueError(f"{CHANGED}: message {number + 1} does not stand once after the text that asks for it")
        lead, tail = pieces[0][len(prompt) :], pieces[1]  # the lead may be an empty thinking block
        ends = self.special_tokens.match(tail.lstrip())
        if ends is None or not alone.endswith(tail):
            raise ValueError(
                f"the chat template ends message {number + 1} with no special token, so a model cannot learn to stop"
            )
        words = alone[len(prompt) : len(alone) - len(tail)].removeprefix(lead)
        if answer["content"].strip() not in words:
            raise ValueError(f"the chat template leaves out a part of message {number + 1}")
        for beginning in (lead + words, words):  # only the last answer may have the lead
            if text.startswith(beginning, len(prompt)):
                end = self._end(text, len(prompt) + len(beginning), ends[0])
                if end is not None:
                    return len(prompt), end
        raise ValueError(f"{CHANGED}: message {number + 1} is not in the text of the whole conversation")

    def _end(self, text: str, end: int, end_tokens: str) -> int | None:
        """Return where the end tokens after an answer's last word end; None if no special token follows.

        An answer inside a conversation may end with another token than the last one.
        """
        end += len(text[end:]) - len(text[end:].lstrip())
        if text.startswith(end_tokens, end):
            return end + len(end_tokens)
        other = self.special_token.match(text, end)
        return other.end() if other else None


def end_token_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token that ends an answer under the tokenizer's chat template.

    Raises:
        ValueError: the template fails on a simple conversation, marks no answer, or teaches no end; with the reason.
    """
    finder = AnswerFinder(tokenizer)
    text, spans = finder(SAMPLE)
    if not spans or SENTINELS[1] not in text[slice(*spans[-1])]:
        raise ValueError("it does not mark the assistant's words")
    ends = [found for found in finder.special_token.finditer(text, *spans[-1]) if found.end() == spans[-1][1]]
    if not ends:
        raise ValueError(
            "no special token ends an answer, so a model trained with it would never stop. Write {{ eos_token }} at the end of "
            "the {% generation %} block"
        )
    return ends[0][0]
