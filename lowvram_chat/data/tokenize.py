"""Conversations become rows of token ids and labels: once, on disk, under a key made of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lowvram_chat.data.reader import Facts, Reader
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
"""Raised whenever the same text would give other rows."""
ROWS_PER_WRITE = 2000
"""Rows that are written at once; what an interruption loses at most."""


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the processes of one run want the same rows
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
    shape = (CACHE_VERSION, source.fingerprint, limit, data.format, data.loss_on, data.max_length, data.overflow)
    vocabulary = (sorted(tokenizer.get_vocab().items()), tokenizer.backend_tokenizer.to_str())
    text = repr((shape, tokenizer.chat_template, tokenizer.eos_token_id, vocabulary))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(path: Path) -> Facts | None:
    """Return the facts of rows that are whole in the cache."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if stored["crc32"] == crc32(path):
            return Facts(**stored["facts"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s: the cached rows are damaged; made anew.", path)
    return None


def _write(path: Path, source: Source, tokenizer: PreTrainedTokenizerBase, data: Data, limit: int | None) -> Facts:
    """Tokenise the source into the cache, from where an interrupted run left off.

    Nothing under the final name is ever half-written.
    """
    import pyarrow

    columns = {"input_ids": pyarrow.list_(pyarrow.int32()), "labels": pyarrow.list_(pyarrow.int32())}
    schema = pyarrow.schema({**columns, "length": pyarrow.int32(), "conversation": pyarrow.int32()})
    stream = RowStream.open(path.with_suffix(".partial"), schema)
    reader = Reader(source, tokenizer, data, limit, stream.state)
    if stream.state:
        log.info("%s: going on after %s conversations", source.name, f"{reader.facts.conversations:,}")
    rows: list[tuple[int, TokenRow]] = []
    for number, made in reader.rows():
        rows += [(number, row) for row in made]
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
