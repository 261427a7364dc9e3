"""Tokenises conversations once and keeps the rows on disk, under a key made of everything that they depend on."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lowvram_chat.data.facts import Facts
from lowvram_chat.data.markup import markup_of
from lowvram_chat.data.reader import ReadConversation, Reader, ReaderState
from lowvram_chat.data.sources import Source
from lowvram_chat.data.stream import RowStream, crc32
from lowvram_chat.errors import DataError
from lowvram_chat.files import cache_folder
from lowvram_chat.recipe.schema import Data
from lowvram_chat.units import count

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CACHE_VERSION = 3
"""Increased whenever the same text gives different rows."""
CONVERSATIONS_PER_WRITE = 2000
"""Conversations that are written at once, and the most that an interruption loses."""


@dataclass(frozen=True)
class Tokenized:
    """The token rows of a source, memory-mapped from the cache."""

    rows: datasets.Dataset
    """Columns `input_ids` (T,), `labels` (T,), `length` (T), and the number in the source and the digest of the row's
    `conversation`."""
    facts: Facts
    name: str
    """Name of the source."""


def tokenize(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> Tokenized:
    """Return the token rows of the first `limit` conversations of a source (None: all), from the cache if it holds them.

    Raises:
        DataError: more than `data.max_bad_rows` rows cannot be used, or no row carries loss.
    """
    import datasets

    path = cache_folder() / f"{_key(source, tokenizer, data, limit)}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the processes of a distributed run tokenise the same source
        facts = _cached(path)
        if facts is None:
            log.info("%s: tokenising ...", source.name)
            facts = _write(path, source, tokenizer, data, limit)
            origin = f"kept in {path}"
        else:
            origin = f"from the cache {path}"
    _check(facts, source.name, data)
    for line in summary(facts, data):
        log.info("%s: %s", source.name, line)
    log.info("%s: token rows %s", source.name, origin)
    _report(facts, source.name)
    return Tokenized(rows=datasets.Dataset.from_file(str(path)), facts=facts, name=source.name)


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> str:
    """Return a digest of everything that the rows depend on."""
    settings = (CACHE_VERSION, source.fingerprint, limit, data.format, data.loss_on, data.max_length, data.overflow)
    vocabulary = (sorted(tokenizer.get_vocab().items()), tokenizer.backend_tokenizer.to_str())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    day = datetime.date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""
    template = (tokenizer.chat_template, special, markup_of(tokenizer), day)
    text = repr((settings, template, tokenizer.eos_token_id, vocabulary))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(path: Path) -> Facts | None:
    """Return the facts of cached rows; None where they are missing or damaged."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if stored["crc32"] == crc32(path):
            return Facts(**stored["facts"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s: the cached rows are damaged and are made again.", path)
    return None


def _write(path: Path, source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> Facts:
    """Tokenise the source into the cache, continuing after an interruption.

    A file never has its final name before it is complete.
    """

    stream: RowStream[ReaderState] = RowStream.open(path.with_suffix(".partial"), _schema())
    reader = Reader(source, tokenizer, data, limit, stream.state)
    if stream.state:
        log.info("%s: continuing after %s conversations", source.name, f"{reader.facts.conversations:,}")
    read: list[ReadConversation] = []
    for conversation in reader.conversations():
        read.append(conversation)
        if len(read) >= CONVERSATIONS_PER_WRITE:
            stream.write(_record_batch(read), reader.state())
            read = []
    stream.write(_record_batch(read), reader.state())
    facts = reader.facts
    if facts.bad_rows <= facts.allowed_bad_rows(data) and facts.rows:
        checksum = stream.finish(path)
        facts = replace(facts, duplicates=count_duplicates(path))
        path.with_suffix(".json").write_text(json.dumps({"crc32": checksum, "facts": asdict(facts)}), encoding="utf-8")
    else:
        stream.discard()
    return facts


def _schema() -> pyarrow.Schema:
    import pyarrow

    columns = {"input_ids": pyarrow.list_(pyarrow.int32()), "labels": pyarrow.list_(pyarrow.int32())}
    return pyarrow.schema(
        {**columns, "length": pyarrow.int32(), "conversation": pyarrow.int32(), "digest": pyarrow.int64()}
    )


def _record_batch(read: list[ReadConversation]) -> pyarrow.RecordBatch:
    """Return the token rows of conversations as columns of the schema."""
    import pyarrow

    pairs = [(conversation, row) for conversation in read for row in conversation.token_rows]
    ids, labels = [row.input_ids for _, row in pairs], [row.labels for _, row in pairs]
    numbers = [conversation.number for conversation, _ in pairs]
    digests = [conversation.row.digest for conversation, _ in pairs]
    return pyarrow.record_batch([ids, labels, [*map(len, ids)], numbers, digests], schema=_schema())


def count_duplicates(path: Path) -> int:
    """Return the number of conversations in a file of rows whose text an earlier one has, too."""
    import datasets

    rows = datasets.Dataset.from_file(str(path))
    digests = dict(zip(rows["conversation"][:], rows["digest"][:], strict=True))
    return len(digests) - len(set(digests.values()))


def _check(facts: Facts, name: str, data: Data) -> None:
    """Refuse a source with too many unusable rows or without rows.

    Raises:
        DataError: more than `data.max_bad_rows` rows cannot be used, or no row carries loss.
    """
    if facts.bad_rows > facts.allowed_bad_rows(data):
        raise DataError(
            f"{name}: {facts.bad_rows:,} of {count(facts.rows_read, 'row')} cannot be used, and data.max_bad_rows is "
            f"{data.max_bad_rows}. Correct them, or set data.max_bad_rows={facts.bad_rows} to skip them.{_listed(facts)}"
        )
    if not facts.rows:
        raise DataError(
            f"{name}: no row to train on, of {count(facts.rows_read, 'row')}. Check the data, data.limit, and data.max_length: "
            "a row needs at least one token that carries loss."
        )


def _listed(facts: Facts) -> str:
    """Return the first unusable rows, each on a line."""
    more = facts.bad_rows - len(facts.bad_examples)
    return "".join(f"\n  {line}" for line in facts.bad_examples) + (f"\n  and {more:,} more" if more else "")


def _report(facts: Facts, name: str) -> None:
    """Log everything that was left out or changed, and what the user should look at."""
    conversations = functools.partial(count, noun="conversation")
    if facts.bad_rows:
        log.warning("%s: skipped %s that cannot be used:%s", name, count(facts.bad_rows, "row"), _listed(facts))
    if facts.columns_not_used:
        listed = ", ".join(f"{column} ({rows:,})" for column, rows in facts.columns_not_used.items())
        log.warning("%s: columns not used, with the number of rows: %s", name, listed)
    if facts.duplicates:
        log.warning("%s: %s with the same text as an earlier one", name, conversations(facts.duplicates))
    if facts.special_tokens_removed:
        log.info("%s: removed special tokens from the text of %s", name, conversations(facts.special_tokens_removed))
    if facts.spelled_turns:
        log.warning(
            "%s: the text of %s contains what begins a turn in the chat template; the model cannot tell it from a real turn",
            name,
            conversations(facts.spelled_turns),
        )


def summary(facts: Facts, data: Data) -> Iterator[str]:
    """Yield three lines that sum up a source: what it gives, what is cut off, and what is wrong with it."""
    share = facts.loss_tokens / facts.tokens if facts.tokens else 0.0
    yield (
        f"{count(facts.conversations, 'conversation')} in {count(facts.rows, 'row')}; {count(facts.tokens, 'token')}, "
        f"{share:.0%} with loss"
    )
    over = f"{count(facts.shortened, 'conversation')} over data.max_length={data.max_length}"
    if data.overflow == "split":
        yield f"{over}, split into rows; longest row {count(facts.longest, 'token')}"
    else:
        yield f"{over}, with {facts.share_cut:.1%} of the text cut off; longest row {count(facts.longest, 'token')}"
    yield (
        f"{count(facts.bad_rows, 'bad row')}, {count(facts.duplicates, 'duplicate')}, "
        f"{count(facts.without_loss, 'conversation')} without loss left out"
    )
