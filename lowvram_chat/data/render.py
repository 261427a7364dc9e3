"""Renders conversations as text, and says which parts of the text carry loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowvram_chat.data.answers import AnswerFinder
from lowvram_chat.data.conversation import Conversation
from lowvram_chat.data.markup import bos_text
from lowvram_chat.data.template_text import Spans, check_whole, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and where its loss is."""

    text: str
    loss: Spans | None = None
    """The parts that carry loss; None: all of the text does, but for `without_loss`."""
    without_loss: Spans = field(default_factory=list)
    append_eos: bool = False
    """Whether an EOS token with loss follows the text."""


class Renderer:
    """Renders conversations under a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
        """Set up a renderer; `loss_on` is `data.loss_on`."""
        self.tokenizer = tokenizer
        self.loss_on_all = loss_on == "all"
        self.answers = AnswerFinder(tokenizer)
        self.bos = bos_text(tokenizer)

    def __call__(self, conversation: Conversation) -> Rendered:
        """Return the text of a conversation and the parts of it that carry loss.

        Raises:
            ValueError: the template refuses the conversation, or its answers cannot be told apart in the text.
        """
        if not conversation.messages:
            return Rendered(self.bos + conversation.text, append_eos=conversation.append_eos)
        if self.loss_on_all and not conversation.untrained:
            text = render_text(self.tokenizer, conversation.messages)
            check_whole(text, conversation.messages)
            return Rendered(text)
        if self.loss_on_all and any(
            conversation.messages[number]["role"] != "assistant" for number in conversation.untrained
        ):
            raise ValueError("a weight of 0 on a message of the user cannot be kept to with data.loss_on=all")
        text, spans = self.answers(conversation.messages)
        check_whole(text, conversation.messages)
        untrained = _numbered_spans(conversation, spans, conversation.untrained) if conversation.untrained else []
        if self.loss_on_all:
            return Rendered(text, without_loss=untrained)
        if not (conversation.untrained or conversation.context):
            return Rendered(text, spans)
        context = set(range(conversation.context))
        skipped = _numbered_spans(conversation, spans, conversation.untrained | context)
        return Rendered(text, [span for span in spans if span not in skipped])


def _numbered_spans(conversation: Conversation, spans: Spans, numbers: frozenset[int]) -> Spans:
    """Return the spans of the messages with these numbers.

    Raises:
        ValueError: the template marks another number of answers than the conversation has.
    """
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if len(answers) != len(spans):
        raise ValueError(
            f"the chat template marks {len(spans)} answers of {len(answers)}, so those without loss cannot be told apart"
        )
    return [span for number, span in zip(answers, spans, strict=True) if number in numbers]
