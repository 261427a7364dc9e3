"""Encodes conversations into token ids and labels, at nearly the speed of the tokenizer alone.

Conversations are rendered in batches and cut to the text that can matter. A background thread encodes each batch on all
cores while the batch before it is labelled.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from transformers.utils.chat_template_utils import render_jinja_template

from lowvram_chat.data.formats import Conversation, Message
from lowvram_chat.data.rows import IGNORED_LABEL

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS_PER_BATCH = 256
"""Number of conversations that are rendered and encoded together."""
CHARACTERS_PER_TOKEN = 6
"""Characters that are encoded for each token that is kept. English has 4 to 5; a text that gives too few tokens is encoded
again as a whole."""
CUT_MARGIN_TOKENS = 16
"""Tokens that a cut text must give beyond those that are kept, because a cut can change the tokens of the word at the cut."""

LabelledTokens = tuple[list[int], list[int]]
"""Token ids and labels of a conversation; a label is the token id, or `IGNORED_LABEL` where there is no loss."""
Spans = list[tuple[int, int]]
"""Positions of the assistant's words in a text: (first character, one past the last character)."""
Item = TypeVar("Item")


class TemplateRenderer(Protocol):
    """The signature of `render_jinja_template` as it is used here; its own annotation leaves out the spans."""

    def __call__(
        self,
        *,
        conversations: list[list[Message]],
        chat_template: str | None,
        return_assistant_tokens_mask: bool,
        **special_tokens: str,
    ) -> tuple[list[str], list[Spans]]:
        """Return the text of each conversation and, where asked for, the spans of the assistant's words."""


_render_template = cast("TemplateRenderer", render_jinja_template)


class Encoder:
    """Encodes conversations into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, keep: int | None) -> None:
        """Set up an encoder; `keep` is the number of tokens needed of each conversation (None: all)."""
        self.tokenizer = tokenizer
        self.loss_on_assistant = loss_on == "assistant"
        self.keep = keep if _splits_into_words(tokenizer) else None

    def __call__(self, conversations: Iterable[Conversation]) -> Iterator[LabelledTokens]:
        """Yield the tokens of each conversation in order; a long one may be cut, but not to `keep` tokens or fewer."""
        previous = None
        with ThreadPoolExecutor(1) as background:
            for batch in _batches(iter(conversations), CONVERSATIONS_PER_BATCH):
                texts, spans = self._render(batch)
                encodings = background.submit(self._encode, texts)
                if previous is not None:
                    yield from self._label(*previous)
                previous = batch, spans, encodings
            if previous is not None:
                yield from self._label(*previous)

    def _render(self, batch: Sequence[Conversation]) -> tuple[list[str], list[Spans]]:
        """Return the text of each conversation, and the spans of the assistant's words in it (empty where not needed)."""
        if not batch[0].messages:
            return [conversation.text for conversation in batch], [[] for _ in batch]
        texts, spans = _render_template(
            conversations=[list(conversation.messages) for conversation in batch],
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=self.loss_on_assistant,
            **self.tokenizer.special_tokens_map,
        )
        return list(texts), list(spans) if self.loss_on_assistant else [[] for _ in batch]

    def _encode(self, texts: list[str]) -> list[Encoding]:
        """Return the encodings of texts; only the beginning of a long text is encoded where that gives enough tokens."""
        encode_batch = self.tokenizer.backend_tokenizer.encode_batch
        if self.keep is None:
            return list(encode_batch(texts, add_special_tokens=False))
        heads = [text[: CHARACTERS_PER_TOKEN * self.keep] for text in texts]
        encodings = list(encode_batch(heads, add_special_tokens=False))
        too_short = [
            number
            for number, (text, head, encoding) in enumerate(zip(texts, heads, encodings, strict=True))
            if len(head) < len(text) and len(encoding) < self.keep + CUT_MARGIN_TOKENS
        ]
        whole = encode_batch([texts[number] for number in too_short], add_special_tokens=False)
        for number, encoding in zip(too_short, whole, strict=True):
            encodings[number] = encoding
        return encodings

    def _label(
        self, batch: Sequence[Conversation], spans: list[Spans], encodings: Future[list[Encoding]]
    ) -> Iterator[LabelledTokens]:
        """Yield the token ids and labels of each conversation of a batch."""
        for conversation, assistant_spans, encoding in zip(batch, spans, encodings.result(), strict=True):
            ids = encoding.ids
            if not conversation.messages:
                ids = ids + [self.tokenizer.eos_token_id] * conversation.append_eos
            partly = conversation.messages and self.loss_on_assistant
            yield ids, _labels(ids, assistant_spans, encoding) if partly else ids


def _labels(ids: list[int], spans: Spans, encoding: Encoding) -> list[int]:
    """Return the ids within the spans and `IGNORED_LABEL` elsewhere; a span beyond the end of the text ends with the text."""
    labels = [IGNORED_LABEL] * len(ids)
    for first, end in spans:
        start_token = encoding.char_to_token(first)
        if start_token is None:  # the text was cut before this span
            break
        last_token = encoding.char_to_token(end - 1)
        end_token = len(ids) if last_token is None else last_token + 1
        labels[start_token:end_token] = ids[start_token:end_token]
    return labels


def _splits_into_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer splits a text into words before it makes tokens, as GPT-2's does.

    Only then does cutting a text change no tokens except those of the word at the cut.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return any(rule["type"] == "ByteLevel" for rule in rules.get("pretokenizers", [rules]) if rule)


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one possibly shorter (itertools.batched needs Python 3.12)."""
    while batch := list(itertools.islice(items, size)):
        yield batch
