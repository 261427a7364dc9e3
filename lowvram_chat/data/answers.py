"""Finds the assistant's words in a rendered conversation, each answer with the token that ends it.

A template may mark them with {% generation %}. Without marks they are found by rendering the conversation turn by turn: an
answer begins where the text that asks for it ends. Both ways each answer must be whole, and the special token after it is
part of it, because a model only stops if it learned to.
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

USER, ANSWER, NEXT = SENTINELS
SAMPLE = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
"""A conversation that every chat template accepts."""
LONGER_SAMPLE = [*SAMPLE, {"role": "user", "content": NEXT}]
PROBE = "QZXPROBEQZX"
"""An answer in place of a message's own, around which the template's text is found."""
CHANGED = "the chat template renders an answer differently from what it asks for"
NO_END = (
    "no special token ends an answer, so a model trained with it would never stop. Write {{ eos_token }} at the end of the "
    "{% generation %} block, or after each answer"
)


class AnswerFinder:
    """Finds the answers in conversations under a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set up a finder for the tokenizer's present template."""
        self.tokenizer = tokenizer
        self.is_marked = bool(tokenizer.chat_template) and marks_answers(tokenizer)
        one = "|".join(map(re.escape, markup_of(tokenizer).special_tokens)) or r"(?!)"
        self.special_token, self.special_tokens = re.compile(one), re.compile(f"(?:{one})+")
        self.ends = self._end_tokens() if tokenizer.chat_template else ()

    def __call__(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """Return the text of messages and the span of each answer, with the tokens that end it.

        Raises:
            ValueError: the template refuses the messages, or the answers cannot be found in its text.
        """
        text, spans = self._marked(messages) if self.is_marked else self._by_turns(messages)
        if any(earlier[1] > later[0] for earlier, later in itertools.pairwise(spans)):
            raise ValueError(CHANGED)
        return text, spans

    def _end_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that the template writes after an answer; empty if some answer has none.

        After the last answer nothing follows, so all special tokens there end it. After one inside a conversation the next turn
        follows: what it begins with, at the start of a conversation too, ends no answer.
        """
        after_last = self._pieces(SAMPLE)[2:3]
        run = self.special_tokens.match(after_last[0].lstrip()) if after_last else None
        if run is None:
            return ()
        start, *_, inside, _ = self._pieces(LONGER_SAMPLE) or ("", run[0], "")
        if inside.lstrip().startswith(run[0]):
            return (run[0],)
        first = self.special_token.match(inside.lstrip())
        turn, before = (self.special_token.findall(text) for text in (inside, start))
        is_next_turn = before[len(before) - len(turn) :] == turn
        return (
            ()
            if first is None or (is_next_turn and first[0] != self.special_token.findall(run[0])[0])
            else (run[0], first[0])
        )

    def _pieces(self, sample: Sequence[Message]) -> list[str]:
        """Return what the template writes before, between and after the messages of a sample; empty if it refuses them."""
        try:
            pieces = re.split("|".join(SENTINELS), render_text(self.tokenizer, sample))
        except ValueError:  # a template for single exchanges
            return []
        return pieces if len(pieces) == len(sample) + 1 else []

    def _end_of_answer(self, text: str, end: int) -> int | None:
        """Return where the tokens that end an answer end, if they follow its last word at `end`; white space may be between."""
        end += len(text[end:]) - len(text[end:].lstrip())
        return next(
            (end + len(token) for token in sorted(self.ends, key=len, reverse=True) if text.startswith(token, end)),
            None,
        )

    def _marked(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """Return the text of messages and its marked answers, each from its mark to the token that ends it."""
        text, marks = render_marked(self.tokenizer, messages)
        marks = [(first, end) for first, end in marks if self.special_tokens.sub("", text[first:end]).strip()]
        answers = [(number, message) for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
        if len(marks) != len(answers):
            raise ValueError(f"the chat template marks {len(marks)} answers, but the conversation has {len(answers)}")
        spans = []
        for (number, message), (first, end) in zip(answers, marks, strict=True):
            words = message["content"].strip()
            place = text.find(words, first, end)
            if place < 0:
                raise ValueError(f"the chat template leaves out a part of message {number}")
            if self.special_token.search(text, first, place):
                raise ValueError(f"the chat template marks more than the words of message {number}")
            last = place + len(words)
            end_of_mark = (
                last + len(text[last:end]) - len(text[last:end].lstrip())
            )  # a mark may end before the end token
            spans.append((first, self._end_of_answer(text, last) or max(end_of_mark, last)))
        return text, spans

    def _by_turns(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """Return the text and the answers of messages under a template without marks."""
        text = render_text(self.tokenizer, messages)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._answer(text, messages, number) for number in numbers]

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
        if not alone.endswith(tail):
            raise ValueError(f"{CHANGED}: what follows message {number + 1} depends on what it says")
        words = alone[len(prompt) : len(alone) - len(tail)].removeprefix(lead)
        if answer["content"].strip() not in words:
            raise ValueError(f"the chat template leaves out a part of message {number + 1}")
        for beginning in (lead + words, words):  # only the last answer may have the lead
            if text.startswith(beginning, len(prompt)):
                end = self._end_of_answer(text, len(prompt) + len(beginning))
                if end is None:
                    raise ValueError(f"no special token ends message {number + 1} in the chat template's text")
                return len(prompt), end
        raise ValueError(f"{CHANGED}: message {number + 1} is not in the text of the whole conversation")


def end_tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens at which an answer ends under the tokenizer's chat template: the first of each ending.

    Raises:
        ValueError: the template fails on a simple conversation, marks no answer, or teaches no end; with the reason.
    """
    finder = AnswerFinder(tokenizer)
    text, spans = finder(SAMPLE)
    if not spans or ANSWER not in text[slice(*spans[-1])]:
        raise ValueError("it does not mark the assistant's words")
    if not finder.ends or not any(text.endswith(end, *spans[-1]) for end in finder.ends):
        raise ValueError(NO_END)
    firsts = (finder.special_token.match(end) for end in finder.ends)
    return list(dict.fromkeys(first[0] for first in firsts if first))
