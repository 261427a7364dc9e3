"""Opens sources of conversations: files, globs, hub datasets and the built-in sample, read as (place, raw row) pairs."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowvram_chat.errors import DataError, NotFoundError, did_you_mean
from lowvram_chat.hub import explain

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN_DATASETS = {
    "builtin:chitchat": ASSETS / "chitchat" / "train.jsonl",
    "builtin:chitchat-held-out": ASSETS / "chitchat" / "held_out.jsonl",
}


@dataclass(frozen=True)
class BadRow:
    """A row that could not be parsed."""

    reason: str


RawRow = Mapping[str, object] | BadRow
PlacedRows = Iterator[tuple[str, RawRow]]
"""Pairs of a place, such as `chats.jsonl:3`, and the row that was read there."""


@dataclass(frozen=True)
class Source:
    """A source of rows that can be read more than once."""

    name: str
    rows: Callable[[], PlacedRows]
    """Starts a new reading from the first row."""
    fingerprint: str
    """Digest of the content: it changes when the content changes."""


def open_source(source: str | list[str], *, split: str, subset: str | None) -> Source:
    """Return the source that a recipe's `data.source` names; several names are read one after the other.

    Raises:
        NotFoundError: there is no such file or dataset, or the hub cannot be reached.
        DataError: the list is empty, or a file has an unknown suffix.
    """
    names = [source] if isinstance(source, str) else source
    parts = [_open_name(name, split, subset) for name in names]
    if not parts:
        raise DataError("data.source: the list is empty. Name at least one file or dataset.")
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Source(", ".join(names), lambda: (pair for part in parts for pair in part.rows()), digest)


def _open_name(name: str, split: str, subset: str | None) -> Source:
    if name.startswith("builtin:"):
        if name not in BUILTIN_DATASETS:
            raise NotFoundError(
                f"{name}: there is no such built-in dataset.{did_you_mean(name, BUILTIN_DATASETS)} "
                f"Known: {', '.join(BUILTIN_DATASETS)}."
            )
        return _files(name, [BUILTIN_DATASETS[name]])
    matches = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
    paths = [Path(path) for path in matches if Path(path).is_file()]
    if paths:
        return _files(name, paths)
    if _looks_like_a_path(name):
        raise NotFoundError(
            f"{name}: no file of that name or pattern. Give a file, a glob in quotes, or a hub id (owner/name)."
        )
    return _hub(name, split, subset)


def is_remote(name: str) -> bool:
    """Return whether the name of a model or dataset can only be that of one on the hub or in its cache."""
    local = name.startswith("builtin:") or _is_path(name)
    return not (local or Path(name).exists() or glob.glob(name, recursive=True))


def _is_path(name: str) -> bool:
    """Return whether a name is that of a path: no model or dataset on the hub can have it."""
    return Path(name).suffix in FILE_READERS or "\\" in name or name.startswith((".", "/", "~"))


def _looks_like_a_path(name: str) -> bool:
    """Return whether a name is not of the form owner/name of hub datasets."""
    return _is_path(name) or "*" in name or "?" in name or name.count("/") != 1


def _files(name: str, paths: list[Path]) -> Source:
    """Return local files as one source.

    Raises:
        DataError: a file has an unknown suffix.
    """
    for path in paths:
        if path.suffix not in FILE_READERS:
            raise DataError(
                f"{path}: files that end in '{path.suffix}' are not read. Use one of {', '.join(FILE_READERS)}."
            )
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return Source(
        name, lambda: (pair for path in paths for pair in FILE_READERS[path.suffix](path)), digest.hexdigest()
    )


def _jsonl(path: Path) -> PlacedRows:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)


NOT_UTF8 = BadRow("not UTF-8 text")
NOT_UTF8_BYTE = re.compile(r"[\udc80-\udcff]|\\udc[89a-f]")
"""A byte that is not UTF-8, in the form that Python's surrogateescape handler gives it and as `repr` shows it."""


def _json_object(line: str) -> RawRow:
    if re.search(r"[\udc80-\udcff]", line):
        return NOT_UTF8
    try:
        row = json.loads(line)
    except ValueError as error:
        return BadRow(f"not JSON ({error})")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def _json(path: Path) -> PlacedRows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON ({error}). A .json file holds one list of rows; one row on each line is a .jsonl file."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__}, not a list of rows. Put the rows into a list.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row if isinstance(row, dict) else BadRow("not a JSON object")


def _csv(path: Path) -> PlacedRows:
    csv.field_size_limit(2**31 - 1)  # for long conversations; a larger limit overflows C's long on Windows
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{path}:{reader.line_num}", NOT_UTF8 if NOT_UTF8_BYTE.search(repr(row)) else row


def _parquet(path: Path) -> PlacedRows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}). Check the file.") from None


FILE_READERS: Mapping[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub(name: str, split: str, subset: str | None) -> Source:
    """Return one split of a hub dataset, from the network or from the hub cache.

    Raises:
        NotFoundError: the dataset is neither reachable nor cached, or has no such split or subset.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split)
    except OSError as error:
        raise NotFoundError(explain("dataset", name, error)) from None
    except ValueError as error:  # an unknown split or subset; the message of datasets lists the known ones
        raise NotFoundError(
            f"{name}: {str(error).splitlines()[0]} Set data.split or data.subset to a known one."
        ) from None
    files = "".join(Path(part["filename"]).as_posix() for part in data.cache_files)
    digest = hashlib.sha256(f"{files}{data.num_rows}".encode()).hexdigest()
    return Source(
        f"{name} ({split})",
        lambda: ((f"{name} {split}: row {number}", row) for number, row in enumerate(data, start=1)),
        digest,
    )
