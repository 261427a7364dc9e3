"""A conversation with a model, within the positions that the model has."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
from transformers import TextStreamer

from lowvram_chat.data.template import read_template
from lowvram_chat.errors import UsageError
from lowvram_chat.model.generation import Messages, encode_messages, generate, stop_token_ids
from lowvram_chat.model.out_of_memory import advised
from lowvram_chat.model.sampling import Sampling
from lowvram_chat.model.saved import DEVICE_ADVICE, OpenedModel, open_model

log = logging.getLogger(__name__)


def open_for_chat(name: str, device: str = "auto") -> OpenedModel:
    """Return a model by name; one without a chat template gets the plain one.

    Raises:
        NotFoundError, ModelError: as `open_model`.
    """
    opened = open_model(name, device)
    if not opened.tokenizer.chat_template:
        log.info("%s has no chat template: using the plain one (user: ... / assistant: ...)", name)
        opened.tokenizer.chat_template = read_template("plain")
    return opened


class ChatSession:
    """A conversation: `ask` adds a turn, `reset` starts again. The oldest turns are dropped when they no longer fit."""

    def __init__(
        self,
        opened: OpenedModel,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> None:
        """Start a conversation; `system` is the system message, `seed` makes its answers repeatable."""
        self.opened = opened
        self.sampling = sampling or Sampling()
        self.start: Messages = [{"role": "system", "content": system}] if system and system.strip() else []
        self.messages = list(self.start)
        self.seed = seed
        self.answers = 0
        """Answers since the start: each has a random state of its own, derived from the seed."""

    def reset(self) -> None:
        """Forget everything but the system message; with a seed, the same questions then get the same answers."""
        self.messages, self.answers = list(self.start), 0

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Return the answer to a message; `on_text` is called with each piece of it as it is generated.

        If the answer is interrupted or fails, the message is forgotten.

        Raises:
            UsageError: the message is empty, or does not fit the model's positions by itself.
            OutOfMemory: the answer does not fit the device.
        """
        if not isinstance(text, str) or not text.strip():
            raise UsageError("The message is empty or not a text. Give a question.")
        opened, asked = self.opened, [*self.messages, {"role": "user", "content": text}]
        kept, tokens = fit_to_positions(opened, asked, self.sampling.max_new_tokens)
        room = min(self.sampling.max_new_tokens, opened.positions - len(tokens))
        sampling = dataclasses.replace(self.sampling, max_new_tokens=room)
        prompt = torch.tensor([tokens], device=opened.model.device)
        streamer = None if on_text is None else _CallbackStreamer(opened, on_text)
        with advised("The answer", DEVICE_ADVICE[prompt.device.type]), self._random_state(prompt.device):
            answer = generate(opened.model, opened.tokenizer, prompt, sampling, streamer)
        self.answers += 1
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        return answer

    @contextlib.contextmanager
    def _random_state(self, device: torch.device) -> Iterator[None]:
        """Use this conversation's own random state, and restore the process's afterwards; without a seed, the process's."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + self.answers)
            yield


def fit_to_positions(opened: OpenedModel, messages: Messages, new_tokens: int) -> tuple[Messages, list[int]]:
    """Return the messages that leave room for an answer, and their tokens. The oldest turns are dropped first.

    Raises:
        UsageError: the last message does not fit by itself.
    """
    room = opened.positions - min(new_tokens, opened.positions // 2)
    kept, dropped = list(messages), 0
    while len(tokens := encode_messages(opened.tokenizer, kept)) > room:
        oldest = 1 if kept[0]["role"] == "system" else 0
        if len(kept) - oldest <= 1:
            raise UsageError(
                f"That message has {len(tokens)} tokens, but only {room} fit into the model's positions. Send a shorter one."
            )
        turns = 2 if len(kept) - oldest > 2 else 1
        del kept[oldest : oldest + turns]
        dropped += turns
    if dropped:
        log.info("(the %d oldest messages no longer fit and were dropped)", dropped)
    return kept, tokens


class _CallbackStreamer(TextStreamer):
    """Hands each finished piece of text to a callback, without the space that an answer begins with."""

    def __init__(self, opened: OpenedModel, on_text: Callable[[str], None]) -> None:
        super().__init__(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = stop_token_ids(opened.model, opened.tokenizer)
        self.on_text = on_text
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; one that ends the answer is no text, also where its vocabulary does not call it special."""
        if self.next_tokens_are_prompt or value.flatten()[0] not in self.stops:
            super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text."""
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        if text:
            self.on_text(text)
