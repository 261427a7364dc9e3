"""Reads a CSV file of published measurements, and checks its cells one by one.

Every mistake in such a file is a `UsageError` of one sentence that names the row and the column.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowvram_chat.errors import NotFoundError, UsageError, did_you_mean

MeasuredRow = Mapping[str, str]
"""Column -> cell."""

WIDE = 160
"""Columns of a table in a file or pipe."""
MAX_CHOICES_LISTED = 8
"""A message lists this many known values at most; of more it names the nearest."""
MAX_SHOWN_CHARACTERS = 60
"""A message shows this much of a wrong cell."""
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


MAX_FIELD_CHARACTERS = 131_072


def read_rows(path: Path, required_columns: Iterable[str]) -> list[MeasuredRow]:
    """Return the rows of a CSV file; it may have more columns than the required ones.

    Raises:
        NotFoundError: there is no such file.
        UsageError: the file is not UTF-8 text or not a CSV file, has no rows, or lacks a column or a cell.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file. Name a CSV file like those in benchmarks/data.")
    rows: list[MeasuredRow] = []
    csv.field_size_limit(MAX_FIELD_CHARACTERS)  # it is one for the whole process, and reading data raises it
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in required_columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path}: columns missing: {', '.join(missing)}. Add them, as in benchmarks/data.")
            for row in reader:
                _check_cells(path, reader.line_num, row)
                rows.append(row)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is not UTF-8 text. Save it as UTF-8.") from None
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num + 1} is not CSV ({error}). Correct it.") from None
    except OSError as error:
        raise UsageError(f"{path}: it cannot be read ({error.strerror}). Name another file.") from None
    if not rows:
        raise UsageError(f"{path}: it has no rows. Add one below the column names.")
    return rows


def choose(row: MeasuredRow, column: str, choices: Iterable[str]) -> str:
    """Return a cell that is one of several words. Raises: UsageError."""
    value, known = row[column], tuple(choices)
    if value in known:
        return value
    hint = f" Known: {', '.join(known)}." if len(known) <= MAX_CHOICES_LISTED else did_you_mean(value, known)
    raise wrong_cell(row, column, f"{shown(value)} is not known.{hint}")


def number(row: MeasuredRow, column: str) -> float:
    """Return a cell that is a finite number above 0. Raises: UsageError."""
    try:
        value = float(row[column])
    except ValueError:
        raise wrong_cell(row, column, f"{shown(row[column])} is not a number. Correct it.") from None
    if not (math.isfinite(value) and value > 0):
        raise wrong_cell(row, column, f"{shown(row[column])} is not a finite number above 0. Correct it.")
    return value


def count(row: MeasuredRow, column: str, most: int) -> int:
    """Return a cell that is a whole number from 1 to `most`. Raises: UsageError."""
    value = number(row, column)
    if value != int(value):
        raise wrong_cell(row, column, f"{shown(row[column])} is not a whole number above 0. Correct it.")
    if value > most:
        raise wrong_cell(row, column, f"{shown(row[column])} is more than {most:,}, the most that is traced. Lower it.")
    return int(value)


def json_object(row: MeasuredRow, column: str) -> dict[str, object]:
    """Return a cell that is a JSON object. Raises: UsageError."""
    try:
        value = json.loads(row[column])
    except (ValueError, RecursionError) as error:
        raise wrong_cell(row, column, f"not JSON ({error}). Correct it.") from None
    if not isinstance(value, dict):
        raise wrong_cell(row, column, f"{shown(row[column])} is not a JSON object. Correct it.")
    return value


def wrong_cell(row: MeasuredRow, column: str, problem: str) -> UsageError:
    """Return the error for a cell."""
    return UsageError(f"row {row['id']}, column {column}: {problem}")


def shown(value: object) -> str:
    """Return a value as messages show it: quoted, escaped and not too long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _check_cells(path: Path, line: int, row: Mapping[str | None, object]) -> None:
    """Check that a row has as many cells as there are columns, a name, and no control characters."""
    name = row.get("id")
    place = (
        f"{path}: row {name}"
        if isinstance(name, str) and name.isprintable() and name.strip()
        else f"{path}: line {line}"
    )
    missing = [column for column, cell in row.items() if cell is None]
    if missing:
        raise UsageError(f"{place}, column {missing[0]}: the line ends before it. Give every column a cell.")
    if None in row:
        raise UsageError(f"{place}: it has more cells than there are columns. Quote the cells that contain a comma.")
    for column, cell in row.items():
        if CONTROL_CHARACTER.search(str(cell)):
            raise UsageError(f"{place}, column {column}: it contains a control character. Remove it.")
    if not str(name).strip():
        raise UsageError(f"{place}, column id: it is empty. Give the row a name.")


def table_width() -> int | None:
    """Return the width of a table: wide enough for every column where the output is no terminal, else the terminal's."""
    return None if sys.stdout.isatty() else WIDE
