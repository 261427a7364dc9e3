"""Parses files of rows: JSON Lines, JSON, CSV and Parquet. A row that cannot be parsed becomes a `BadRow` with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from lowvram_chat.data.conversation import is_message
from lowvram_chat.data.csv_file import csv_rows
from lowvram_chat.data.raw_rows import NOT_UTF8_ROW, BadRow, PlacedRows, RawRow
from lowvram_chat.data.text_files import NOT_UTF8, lines, read_text, text_suffix
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.wording import json_problem, kind_of

ROW_LISTS = ("data", "conversations", "rows", "train", "examples", "instances", "items")
"""Keys of a JSON object under which files keep their list of rows."""

TOO_LONG = BadRow("longer than 64 million characters")


def _jsonl(path: Path) -> PlacedRows:
    is_first = True
    for number, line in lines(path):
        if line is None:
            yield f"{path}:{number}", TOO_LONG
        elif not line.strip():
            continue
        elif is_first and line.lstrip().startswith("["):
            yield from _array_or_lines(path)
            return
        else:
            is_first = False
            yield f"{path}:{number}", _row_of_line(line)


def _array_or_lines(path: Path) -> PlacedRows:
    """Yield the rows of a file that begins with a bracket: one JSON list of rows, whatever its suffix, or lines."""
    text = read_text(path)
    try:
        rows = parse_json(text)
    except ValueError:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _row_of_line(line)
        return
    yield from _numbered(path, rows)


def _row_of_line(line: str) -> RawRow:
    if NOT_UTF8.search(line):
        return NOT_UTF8_ROW
    try:
        row = parse_json(line.lstrip("\ufeff"))  # files that were joined have marks inside
    except ValueError as error:
        return BadRow(str(error))
    return cast("RawRow", row) if isinstance(row, dict) else BadRow("not a JSON object")


class JsonNumber(float):
    """A number whose text is the one in the file: 1.50 stays "1.50"."""

    def __new__(cls, text: str) -> JsonNumber:
        """Return the number of a JSON text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        """Return the text in the file."""
        return self.text


def parse_json(text: str) -> object:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or it holds a key twice, too long a number, or too deep a nesting; in our words.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=JsonNumber)
    except json.JSONDecodeError as error:
        raise ValueError(json_problem(error)) from None
    except RecursionError:
        raise ValueError("not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("not usable JSON: a number has thousands of digits") from None
        raise


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of unique keys: of two equal keys, JSON parsers drop one in silence."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"not usable JSON: the key '{twice}' occurs twice in one object")
    return made


def _json(path: Path) -> PlacedRows:
    text = read_text(path)
    if NOT_UTF8.search(text):
        raise DataError(f"{path}: not UTF-8 text. Save the file as UTF-8.")
    try:
        document = parse_json(text)
    except ValueError as error:
        if _is_json_lines(text):
            yield from _jsonl(path)
            return
        raise DataError(
            f"{path}: {error}. A .json file holds one list of rows, or one row on each line. Correct the file."
        ) from None
    yield from _numbered(path, document)


def _is_json_lines(text: str) -> bool:
    """Return whether the first line of a text is a JSON object by itself."""
    first = text.lstrip().split("\n", 1)[0]
    return isinstance(_row_of_line(first), dict)


def _numbered(path: Path, document: object) -> PlacedRows:
    """Yield the rows of a JSON document, with their numbers.

    Raises:
        DataError: it holds no list of rows.
    """
    rows = _rows_of(document)
    if rows is None:
        raise DataError(f"{path}: holds {kind_of(document)}, not a list of rows. Put the rows into a list.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row if isinstance(row, dict) else BadRow("not a JSON object")


def _rows_of(document: object) -> list[object] | None:
    """Return the list of rows in a JSON document: the list itself, or the only list in an object; None: neither.

    An object that has the columns of a format is one row.
    """
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return None
    lists = {key: value for key, value in document.items() if isinstance(value, list | dict)}
    key = next(iter(lists)) if len(lists) == 1 else ""
    rows = lists[key] if key in ROW_LISTS else None
    if isinstance(rows, list) and not (rows and is_message(rows[0])) and not _is_row({**document, key: None}):
        return rows
    return [document] if _is_row(document) else None


def _is_row(document: Mapping[str, object]) -> bool:
    """Return whether an object has the columns of a format, with something in each."""
    formats = (kind.columns for kind in FORMATS.values())
    return any(all(document.get(column) is not None for column in columns) for columns in formats)


def _parquet(path: Path) -> PlacedRows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two columns are named '{twice}'. Rename one of them.")
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = f"the file is damaged after row {number}" if number else "not a Parquet file, or a damaged one"
        raise DataError(f"{path}: {what} ({str(error).splitlines()[0]}). Copy or download it again.") from None


FILE_PARSERS: Mapping[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": csv_rows,
    ".parquet": _parquet,
}


def parse_file(path: Path) -> PlacedRows:
    """Return an iterator over the rows of a file, by its suffix.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    return FILE_PARSERS[text_suffix(path)](path)


def check_suffix(path: Path) -> None:
    """Refuse a file with an unknown suffix.

    Raises:
        DataError: with the known suffixes.
    """
    packed_parquet = path.suffix.lower() != ".parquet" and text_suffix(path) == ".parquet"
    if text_suffix(path) not in FILE_PARSERS or packed_parquet:
        raise DataError(
            f"{path}: files that end in '{path.suffix}' are not read. Use one of {', '.join(FILE_PARSERS)}; text may be "
            "compressed (.jsonl.gz, .jsonl.zst)."
        )
