"""Conversations become rows of token ids and labels: once, on disk, under a key made of everything they depend on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.data.formats import FORMATS, Conversation, Format, detect_format
from lowvram_chat.data.rows import IGNORED, Row, cut
from lowvram_chat.data.sources import BadRow, Source
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 2
"""Raised whenever the same text would give other rows."""
BATCH = 256
LISTED = 10


@dataclass
class Facts:
    """What became of a source: counts for the log, the run folder and the model card."""

    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row."""
    shortened: int = 0
    """Conversations that were longer than `max_length` (cut off, or split into windows)."""
    without_loss: int = 0
    """Conversations left out because no token that carries loss is within `max_length`."""
    special_tokens_removed: int = 0
    """Conversations whose text spelled out one of the tokenizer's special tokens."""
    bad_rows: int = 0
    bad_examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenized:
    """Rows on disk: columns `input_ids`, `labels` (T,), `length` (T) and `conversation` (its number in the source)."""

    rows: datasets.Dataset
    facts: Facts
    name: str


def cache_folder() -> Path:
    """Return where token rows are kept: `LOWVRAM_CHAT_CACHE`, else beside the Hugging Face caches."""
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("LOWVRAM_CHAT_CACHE", Path(home) / "lowvram_chat"))


def tokenize(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> Tokenized:
    """Return the token rows of a source, from the cache where it holds them.

    Raises:
        DataError: more than `data.max_bad_rows` rows that cannot be used, or no row that carries loss.
    """
    import datasets

    path = cache_folder() / f"{_key(source, tokenizer, data, limit)}.arrow"
    facts = _cached(path)
    if facts is None:
        log.info("%s: tokenising ...", source.name)
        facts = _write(path, source, tokenizer, data, limit)
        log.info("%s: %s; kept in %s", source.name, _summary(facts), path)
    else:
        log.info("%s: %s; from the cache %s", source.name, _summary(facts), path)
    _check(facts, source.name, data)
    return Tokenized(rows=datasets.Dataset.from_file(str(path)), facts=facts, name=source.name)


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> str:
    """Return a digest of all that the rows depend on."""
    shape = (VERSION, source.fingerprint, limit, data.format, data.loss_on, data.max_length, data.overflow)
    vocabulary = (sorted(tokenizer.get_vocab().items()), tokenizer.backend_tokenizer.to_str())
    text = repr((shape, tokenizer.chat_template, tokenizer.eos_token_id, vocabulary))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(path: Path) -> Facts | None:
    """Return the facts of rows that are whole in the cache."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if stored["crc32"] == _crc32(path):
            return Facts(**stored["facts"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s: the cached rows are damaged; made anew.", path)
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _write(path: Path, source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> Facts:
    """Tokenise the source into the cache; nothing under the final name is ever half-written."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    facts = Facts()
    columns = {"input_ids": pyarrow.list_(pyarrow.int32()), "labels": pyarrow.list_(pyarrow.int32())}
    schema = pyarrow.schema({**columns, "length": pyarrow.int32(), "conversation": pyarrow.int32()})
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        with pyarrow.OSFile(str(partial), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
            for batch in _batches(_rows(source, tokenizer, data, limit, facts), 1000):
                stream.write_batch(_record_batch(batch, schema))
        if facts.bad_rows <= data.max_bad_rows and facts.rows:
            stored = json.dumps({"crc32": _crc32(partial), "facts": asdict(facts)})
            partial.replace(path)
            path.with_suffix(".json").write_text(stored, encoding="utf-8")
    finally:
        partial.unlink(missing_ok=True)
    return facts


def _record_batch(rows: list[tuple[int, Row]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow

    ids, labels = [row.input_ids for _, row in rows], [row.labels for _, row in rows]
    return pyarrow.record_batch([ids, labels, [*map(len, ids)], [number for number, _ in rows]], schema=schema)


def _check(facts: Facts, name: str, data: Data) -> None:
    """Refuse too many bad rows and an empty result; tell of everything that was left out or changed.

    Raises:
        DataError: as above.
    """
    listed = "".join(f"\n  {line}" for line in facts.bad_examples)
    if facts.bad_rows > data.max_bad_rows:
        raise DataError(
            f"{name}: {facts.bad_rows} or more rows cannot be used and data.max_bad_rows is {data.max_bad_rows}. "
            f"Mend them, or raise data.max_bad_rows to skip them.{listed}"
        )
    if not facts.rows:
        raise DataError(
            f"{name}: no row to train on ({_summary(facts)}). Check the data, data.limit, and data.max_length: "
            "a row needs at least one token that carries loss."
        )
    if facts.bad_rows:
        log.warning("%s: skipped %d rows that cannot be used:%s", name, facts.bad_rows, listed)
    if facts.without_loss:
        log.info("%s: left out %d conversations with no loss within data.max_length", name, facts.without_loss)
    if facts.special_tokens_removed:
        log.info("%s: removed special tokens spelled out in %d conversations", name, facts.special_tokens_removed)


def _summary(facts: Facts) -> str:
    return (
        f"{facts.conversations:,} conversations, {facts.rows:,} rows, {facts.tokens:,} tokens, "
        f"{facts.loss_tokens:,} of them with loss, {facts.shortened:,} conversations over the length"
    )


def _rows(
    source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None, facts: Facts
) -> Iterator[tuple[int, Row]]:
    """Yield (conversation number, row), counting into `facts`."""
    conversations = itertools.islice(_conversations(source, data, tokenizer.all_special_tokens, facts), limit)
    for batch in _batches(conversations, BATCH):
        for tokens, labels in _encode(batch, tokenizer, data.loss_on):
            facts.conversations += 1
            facts.shortened += len(tokens) > data.max_length
            rows = [row for row in cut(tokens, labels, data.max_length, data.overflow) if row.loss_tokens]
            facts.without_loss += not rows
            for row in rows:
                facts.rows += 1
                facts.tokens += len(row.input_ids)
                facts.loss_tokens += row.loss_tokens
                facts.longest = max(facts.longest, len(row.input_ids))
                yield facts.conversations - 1, row


def _conversations(source: Source, data: Data, special_tokens: list[str], facts: Facts) -> Iterator[Conversation]:
    """Yield the conversations that can be used; stop early once there are too many that cannot."""
    kind: Format | None = None
    for where, raw in source.rows():
        try:
            if isinstance(raw, BadRow):
                raise ValueError(raw.reason)
            kind = kind or _format(raw, where, data)
            yield _clean(kind.read(raw), special_tokens, facts)
        except DataError:  # a ValueError too, but about the whole source
            raise
        except ValueError as error:
            facts.bad_rows += 1
            if len(facts.bad_examples) < LISTED:
                facts.bad_examples.append(f"{where}: {error}")
            if facts.bad_rows > data.max_bad_rows and facts.bad_rows >= LISTED:
                return


def _format(raw: Any, where: str, data: Data) -> Format:
    """Return the named or detected format.

    Raises:
        DataError: no format fits, or loss on the assistant is asked of a format without roles.
    """
    name = data.format or detect_format(raw, where)
    if data.loss_on == "assistant" and not FORMATS[name].has_roles:
        raise DataError(f"{where}: the format {name} has no assistant turns to learn from. Set data.loss_on=all.")
    return FORMATS[name]


def _encode(
    batch: list[Conversation], tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (token ids, labels) of each conversation; labels are the ids, or -100 where there is no loss."""
    if batch[0].messages:
        encoded = tokenizer.apply_chat_template(
            [list(conversation.messages) for conversation in batch],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=loss_on == "assistant",
        )
        masks = encoded["assistant_masks"] if loss_on == "assistant" else itertools.repeat(None)
        for tokens, mask in zip(encoded["input_ids"], masks):
            yield tokens, tokens if mask is None else [t if m else IGNORED for t, m in zip(tokens, mask, strict=True)]
    else:
        texts = tokenizer([c.text for c in batch], add_special_tokens=False)["input_ids"]
        for conversation, tokens in zip(batch, texts, strict=True):
            ended = tokens + [tokenizer.eos_token_id] * conversation.ends
            yield ended, ended


def _clean(conversation: Conversation, special_tokens: list[str], facts: Facts) -> Conversation:
    """Return the conversation without spelled-out special tokens: an EOS inside a text would teach a false end.

    Raises:
        ValueError: nothing is left of a text, or it is no text that can be encoded.
    """
    texts = [conversation.text, *(message["content"] for message in conversation.messages)]
    cleaned = [_without(text, special_tokens) for text in texts]
    if not all(cleaned[1:] if conversation.messages else cleaned):
        raise ValueError("a message is nothing but special tokens")
    facts.special_tokens_removed += cleaned != texts
    contents = zip(conversation.messages, cleaned[1:], strict=True)
    messages = tuple({**message, "content": content} for message, content in contents)
    return Conversation(messages=messages, text=cleaned[0], ends=conversation.ends)


def _without(text: str, special_tokens: list[str]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair: not text that UTF-8 can hold") from None
    while any(token in text for token in special_tokens):  # removing one can make another
        for token in special_tokens:
            text = text.replace(token, "").strip()
    return text


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items (Python 3.12 has itertools.batched)."""
    while batch := list(itertools.islice(items, size)):
        yield batch
