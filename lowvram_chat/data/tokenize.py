"""Tokenises conversations once and keeps the rows on disk, under a key made of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lowvram_chat.data.reader import Facts, Reader, ReaderState
from lowvram_chat.data.rows import TokenRow
from lowvram_chat.data.sources import Source
from lowvram_chat.data.stream import RowStream, crc32
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CACHE_VERSION = 2
"""Increased whenever the same text gives different rows."""
ROWS_PER_WRITE = 2000
"""Rows that are written at once, and the most that an interruption loses."""


@dataclass(frozen=True)
class Tokenized:
    """The token rows of a source, memory-mapped from the cache."""

    rows: datasets.Dataset
    """Columns `input_ids` (T,), `labels` (T,), `length` (T) and `conversation` (its number in the source)."""
    facts: Facts
    name: str
    """Name of the source."""


def cache_folder() -> Path:
    """Return the folder of the token rows: `LOWVRAM_CHAT_CACHE`, or else one beside the Hugging Face caches."""
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("LOWVRAM_CHAT_CACHE", Path(home) / "lowvram_chat"))


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
            log.info("%s: %s; kept in %s", source.name, _summary(facts), path)
        else:
            log.info("%s: %s; from the cache %s", source.name, _summary(facts), path)
    _check(facts, source.name, data)
    return Tokenized(rows=datasets.Dataset.from_file(str(path)), facts=facts, name=source.name)


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> str:
    """Return a digest of everything that the rows depend on."""
    settings = (CACHE_VERSION, source.fingerprint, limit, data.format, data.loss_on, data.max_length, data.overflow)
    vocabulary = (sorted(tokenizer.get_vocab().items()), tokenizer.backend_tokenizer.to_str())
    text = repr((settings, tokenizer.chat_template, tokenizer.eos_token_id, vocabulary))
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
    import pyarrow

    columns = {"input_ids": pyarrow.list_(pyarrow.int32()), "labels": pyarrow.list_(pyarrow.int32())}
    schema = pyarrow.schema({**columns, "length": pyarrow.int32(), "conversation": pyarrow.int32()})
    stream: RowStream[ReaderState] = RowStream.open(path.with_suffix(".partial"), schema)
    reader = Reader(source, tokenizer, data, limit, stream.state)
    if stream.state:
        log.info("%s: continuing after %s conversations", source.name, f"{reader.facts.conversations:,}")
    rows: list[tuple[int, TokenRow]] = []
    for number, token_rows in reader.rows():
        rows += [(number, row) for row in token_rows]
        if len(rows) >= ROWS_PER_WRITE:
            stream.write(_record_batch(rows, schema), reader.state())
            rows = []
    if rows:
        stream.write(_record_batch(rows, schema), reader.state())
    facts = reader.facts
    if facts.bad_rows <= data.max_bad_rows and facts.rows:
        stored = json.dumps({"crc32": stream.finish(path), "facts": asdict(facts)})
        path.with_suffix(".json").write_text(stored, encoding="utf-8")
    else:
        stream.discard()
    return facts


def _record_batch(rows: list[tuple[int, TokenRow]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return pairs of a conversation's number and a row as columns of the schema."""
    import pyarrow

    ids, labels = [row.input_ids for _, row in rows], [row.labels for _, row in rows]
    return pyarrow.record_batch([ids, labels, [*map(len, ids)], [number for number, _ in rows]], schema=schema)


def _check(facts: Facts, name: str, data: Data) -> None:
    """Refuse a source with too many unusable rows or without rows, and log everything that was left out or changed.

    Raises:
        DataError: more than `data.max_bad_rows` rows cannot be used, or no row carries loss.
    """
    listed = "".join(f"\n  {line}" for line in facts.bad_examples)
    if facts.bad_rows > data.max_bad_rows:
        raise DataError(
            f"{name}: {facts.bad_rows} or more rows cannot be used and data.max_bad_rows is {data.max_bad_rows}. "
            f"Correct them, or raise data.max_bad_rows to skip them.{listed}"
        )
    if not facts.rows:
        raise DataError(
            f"{name}: no row to train on ({_summary(facts)}). Check the data, data.limit, and data.max_length: "
            "a row needs at least one token that carries loss."
        )
    if facts.bad_rows:
        log.warning("%s: skipped %s that cannot be used:%s", name, _count(facts.bad_rows, "row"), listed)
    if facts.without_loss:
        log.info(
            "%s: left out %s with no loss within data.max_length", name, _count(facts.without_loss, "conversation")
        )
    if facts.special_tokens_removed:
        log.info(
            "%s: removed special tokens from the text of %s", name, _count(facts.special_tokens_removed, "conversation")
        )


def _summary(facts: Facts) -> str:
    return (
        f"{_count(facts.conversations, 'conversation')}, {_count(facts.rows, 'row')}, {_count(facts.tokens, 'token')}, "
        f"{facts.loss_tokens:,} of them with loss, {_count(facts.shortened, 'conversation')} over the length"
    )


def _count(number: int, noun: str) -> str:
    """Return a number and its noun: "1 row", "1,809 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
