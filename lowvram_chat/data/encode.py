"""Encodes rendered conversations into token ids and labels, at nearly the speed of the tokenizer alone.

Texts are cut to what can matter and encoded in batches. A background thread encodes each batch on all cores while the batch
before it is labelled and the next one is rendered.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lowvram_chat.data.render import Rendered
from lowvram_chat.data.rows import IGNORED_LABEL
from lowvram_chat.data.template_text import Spans

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS_PER_BATCH = 256
"""Number of conversations that are encoded together."""
CHARACTERS_PER_TOKEN = 6
"""Characters that are encoded for each token that is kept. English has 4 to 5; a text that gives too few tokens is encoded
again as a whole."""
CUT_MARGIN_TOKENS = 16
"""Tokens that a cut text must give beyond those that are kept, because a cut can change the tokens of the word at the cut."""


class Encoded(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    labels: list[int]
    """The token id, or `IGNORED_LABEL` where there is no loss."""
    characters_cut: int
    """Characters of the text after the tokens that are kept."""


Item = TypeVar("Item")


class Encoder:
    """Encodes rendered conversations into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keep: int | None) -> None:
        """Set up an encoder; `keep` is the number of tokens needed of each conversation (None: all)."""
        self.tokenizer = tokenizer
        self.limit = keep
        self.keep = keep if _splits_into_words(tokenizer) else None

    def __call__(self, conversations: Iterable[Rendered]) -> Iterator[Encoded]:
        """Yield the tokens of each conversation in order; a long one may be cut, but not to `keep` tokens or fewer."""
        previous = None
        with ThreadPoolExecutor(1) as background:
            for batch in _batches(iter(conversations), CONVERSATIONS_PER_BATCH):
                encodings = background.submit(self._encode, [conversation.text for conversation in batch])
                if previous is not None:
                    yield from self._label(*previous)
                previous = batch, encodings
            if previous is not None:
                yield from self._label(*previous)

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

    def _label(self, batch: Sequence[Rendered], encodings: Future[list[Encoding]]) -> Iterator[Encoded]:
        """Yield the token ids and labels of each conversation of a batch."""
        for conversation, encoding in zip(batch, encodings.result(), strict=True):
            ids = encoding.ids + [self.tokenizer.eos_token_id] * conversation.append_eos
            yield Encoded(ids, _labels(ids, conversation, encoding), self._characters_cut(conversation.text, encoding))

    def _characters_cut(self, text: str, encoding: Encoding) -> int:
        if self.limit is None or len(encoding) <= self.limit:
            return 0
        place = encoding.token_to_chars(self.limit - 1)
        return len(text) - place[1] if place else 0


def _labels(ids: list[int], conversation: Rendered, encoding: Encoding) -> list[int]:
    """Return the ids where a conversation carries loss and `IGNORED_LABEL` elsewhere."""
    if conversation.loss is None:
        labels = list(ids)
    else:
        labels = [IGNORED_LABEL] * len(ids)
        for start, end in _token_spans(conversation.loss, encoding):
            labels[start:end] = ids[start:end]
    for start, end in _token_spans(conversation.without_loss, encoding):
        labels[start:end] = [IGNORED_LABEL] * (end - start)
    return labels


def _token_spans(spans: Spans, encoding: Encoding) -> Iterator[tuple[int, int]]:
    """Yield (first token, one past the last token) of each span; a span beyond the end of the text ends with the text."""
    last = encoding.token_to_chars(len(encoding) - 1) if len(encoding) else None
    text_end = last[1] if last else 0
    for first, end in spans:
        if first >= text_end:  # the text was cut before this span
            return
        # A tokenizer may drop characters, such as a leading space.
        start_token = _first_token(encoding, range(first, min(end, text_end)))
        end_token = _first_token(encoding, range(min(end, text_end) - 1, first - 1, -1))
        if start_token is not None and end_token is not None:
            yield start_token, _end_of_character(encoding, end_token, end)


def _first_token(encoding: Encoding, characters: range) -> int | None:
    """Return the token of the first of these characters that has one."""
    tokens = (encoding.char_to_token(character) for character in characters)
    return next((token for token in tokens if token is not None), None)


def _end_of_character(encoding: Encoding, token: int, end: int) -> int:
    """Return the token after all tokens that begin before the character `end`: a character may have several tokens."""
    while token < len(encoding) and (place := encoding.token_to_chars(token)) is not None and place[0] < end:
        token += 1
    return token


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
