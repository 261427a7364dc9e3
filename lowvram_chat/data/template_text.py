"""The text of messages under a chat template, and where the template marks the assistant's words in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lowvram_chat.data.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
"""Positions of the assistant's words in a text: (first character, one past the last character)."""


MAX_COUNTED = 100_000
"""Most numbers that `range` gives in one rendering. Source: Jinja's sandbox allows as many in each call."""


class TemplateRenderer(Protocol):
    """The signature of `render_jinja_template` as it is used here; its own annotation leaves out the spans."""

    def __call__(
        self,
        *,
        conversations: Sequence[Sequence[Message]],
        chat_template: str,
        return_assistant_tokens_mask: bool,
        add_generation_prompt: bool,
        range: Callable[..., range],
        **special_tokens: str,
    ) -> tuple[list[str], list[Spans]]:
        """Return the text of each conversation and, where asked for, the spans of the assistant's words."""


_render_template = cast("TemplateRenderer", render_jinja_template)


def render_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Return the text of messages under the tokenizer's chat template.

    Raises:
        ValueError: the template raises an error; with the template's words.
    """
    return _render(tokenizer, messages, mark=False, add_generation_prompt=add_generation_prompt)[0]


def render_marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, Spans]:
    """Return the text of messages and the spans that the template marks with {% generation %}.

    Raises:
        ValueError: as `render_text`.
    """
    return _render(tokenizer, messages, mark=True)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, mark: bool, add_generation_prompt: bool = False
) -> tuple[str, Spans]:
    try:
        [text], spans = _render_template(
            conversations=[messages],
            chat_template=str(tokenizer.chat_template),
            return_assistant_tokens_mask=mark,
            add_generation_prompt=add_generation_prompt,
            range=_bounded_range(),
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:  # raise_exception in a template, its syntax errors and its security errors
        raise ValueError(f"the chat template refuses it: {str(error).rstrip('.') or type(error).__name__}") from None
    except (RecursionError, MemoryError):
        raise ValueError("the chat template calls itself without end, or makes a text without end") from None
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the chat template fails: {error}") from None
    return text, [(first, end) for first, end in spans[0] if first < end] if mark else []


def _bounded_range() -> Callable[..., range]:
    """Return a `range` for one rendering of a template: all that it returns together has at most `MAX_COUNTED` numbers.

    Jinja's own bounds each of them, so that loops within loops would run for days.
    """
    counted = 0

    def bounded(*bounds: int) -> range:
        nonlocal counted
        numbers = range(*bounds)
        counted += len(numbers)
        if counted > MAX_COUNTED:
            raise ValueError(f"its loops count beyond {MAX_COUNTED:,}")
        return numbers

    return bounded


def check_encodable(text: str) -> None:
    """Refuse a text that is no Unicode text.

    Raises:
        ValueError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which UTF-8 cannot encode") from None


def check_whole(text: str, messages: Sequence[Message]) -> None:
    """Refuse a rendered text in which the content of a message is missing, cut or out of order.

    Raises:
        ValueError: with the number of the message.
    """
    place = 0
    for number, message in enumerate(messages, start=1):
        content = message["content"].strip()
        place = text.find(content, place)
        if place < 0:
            raise ValueError(f"the chat template leaves out a part of message {number} ({message['role']})")
        place += len(content)


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's chat template marks the assistant's words with {% generation %}."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", str(tokenizer.chat_template)) is not None
