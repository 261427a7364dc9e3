"""Conversations become token ids and labels, at nearly the speed of the tokenizer alone.

The template is rendered in batches, cut to the text that can matter, and encoded on all cores in the background, while the
batch before it is given its labels.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from lowvram_chat.data.formats import Conversation
from lowvram_chat.data.rows import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS_PER_BATCH = 256
"""Conversations that are rendered and encoded at once."""
CHARACTERS_PER_TOKEN = 6
"""Of the text that is encoded for each token that is kept; English has 4 to 5, and what proves too short is encoded whole."""
CUT_MARGIN_TOKENS = 16
"""Tokens by which a cut text must be longer than what is kept: a cut can change the tokens of the word it falls into."""

LabelledTokens = tuple[list[int], list[int]]
"""Ids and labels of a conversation; labels are the ids, or `IGNORED_LABEL` where there is no loss."""
Spans = list[tuple[int, int]]
"""Places of the assistant's words in a text: (first character, the one after the last)."""


class Encoder:
    """Encodes conversations; `keep` is how many tokens of each are needed at least (None: all)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, keep: int | None) -> None:
        self.tokenizer = tokenizer
        self.marks = loss_on == "assistant"
        self.keep = keep if _splits_into_words(tokenizer) else None

    def __call__(self, conversations: Iterable[Conversation]) -> Iterator[LabelledTokens]:
        """Yield the tokens of each conversation, in order; of one that is long, `keep` and some at least."""
        waiting = None
        with ThreadPoolExecutor(1) as background:
            for batch in _batches(iter(conversations), CONVERSATIONS_PER_BATCH):
                texts, spans = self._render(batch)
                running = background.submit(self._encode, texts)
                if waiting is not None:
                    yield from self._labelled(*waiting)
                waiting = batch, spans, running
            if waiting is not None:
                yield from self._labelled(*waiting)

    def _render(self, batch: Sequence[Conversation]) -> tuple[list[str], list[Spans]]:
        """Return the texts of a batch, and where in each the assistant speaks."""
        if not batch[0].messages:
            return [conversation.text for conversation in batch], [[] for _ in batch]
        texts, spans = render_jinja_template(
            conversations=[list(conversation.messages) for conversation in batch],
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=self.marks,
            **self.tokenizer.special_tokens_map,
        )
        return list(texts), list(spans) if self.marks else [[] for _ in batch]

    def _encode(self, texts: list[str]) -> list[Any]:
        """Return the encodings of texts, of which only the head is encoded where that is enough."""
        encode = self.tokenizer.backend_tokenizer.encode_batch
        if self.keep is None:
            return list(encode(texts, add_special_tokens=False))
        heads = [text[: CHARACTERS_PER_TOKEN * self.keep] for text in texts]
        encodings = list(encode(heads, add_special_tokens=False))
        short = [
            place
            for place, (text, head, encoding) in enumerate(zip(texts, heads, encodings, strict=True))
            if len(head) < len(text) and len(encoding) < self.keep + CUT_MARGIN_TOKENS
        ]
        for place, encoding in zip(
            short, encode([texts[place] for place in short], add_special_tokens=False), strict=True
        ):
            encodings[place] = encoding
        return encodings

    def _labelled(self, batch: Sequence[Conversation], spans: list[Spans], running: Any) -> Iterator[LabelledTokens]:
        for conversation, marked, encoding in zip(batch, spans, running.result(), strict=True):
            ids = encoding.ids
            if not conversation.messages:
                ids = ids + [self.tokenizer.eos_token_id] * conversation.ends
            yield ids, _labels(ids, marked, encoding) if conversation.messages and self.marks else ids


def _labels(ids: list[int], spans: Spans, encoding: Any) -> list[int]:
    """Return the ids within the spans, `IGNORED_LABEL` elsewhere; a span that the text was cut in ends with the text."""
    labels = [IGNORED_LABEL] * len(ids)
    for first, after in spans:
        start = encoding.char_to_token(first)
        if start is None:  # beyond the cut
            break
        last = encoding.char_to_token(after - 1)
        end = len(ids) if last is None else last + 1
        labels[start:end] = ids[start:end]
    return labels


def _splits_into_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer splits a text into words before it makes tokens, as GPT-2's does.

    Only then does a cut change no token but those of the word it falls into.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return any(rule["type"] == "ByteLevel" for rule in rules.get("pretokenizers", [rules]) if rule)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items (Python 3.12 has itertools.batched)."""
    while batch := list(itertools.islice(items, size)):
        yield batch
