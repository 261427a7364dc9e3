"""Parses CSV files strictly: a row with too many cells or an open quotation mark is a bad row, not another row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from lowvram_chat.data.raw_rows import NOT_UTF8_ROW, BadRow, PlacedRows, RawRow
from lowvram_chat.data.text_files import NOT_UTF8, READ_ERRORS, damaged, open_text
from lowvram_chat.errors import DataError


def csv_rows(path: Path) -> PlacedRows:
    """Yield the rows of a CSV file.

    Raises:
        DataError: the header cannot be used, or the file cannot be read to its end.
    """
    csv.field_size_limit(2**31 - 1)  # for long conversations; a larger limit overflows C's long on Windows
    line = 0
    try:
        with open_text(path) as file:
            reader = csv.reader(file, strict=True)
            header = _header(path, reader)
            while True:
                line = reader.line_num
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"{path}:{reader.line_num}", BadRow(_csv_problem(error, line + 1, reader.line_num))
                    continue
                if cells:
                    yield f"{path}:{reader.line_num}", _row_of_cells(header, cells)
    except READ_ERRORS as error:
        raise damaged(path, f"after line {line}", error) from None


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    """Return the column names of a CSV file.

    Raises:
        DataError: a name occurs twice, or the header cannot be read.
    """
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise DataError(f"{path}: the header is not CSV ({error}). Correct the first line.") from None
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are named '{twice}'. Rename one of them.")
    if len(header) == 1 and any(separator in header[0] for separator in ";\t"):
        raise DataError(
            f"{path}: the header has no commas ({header[0]!r}). Save the file as CSV with commas between the columns."
        )
    return header


def _row_of_cells(header: list[str], cells: list[str]) -> RawRow:
    if any(NOT_UTF8.search(cell) for cell in cells):
        return NOT_UTF8_ROW
    if len(cells) != len(header):
        return BadRow(
            f"{len(cells)} cells, but the header has {len(header)} columns. Put text with commas or line ends into quotation "
            "marks"
        )
    return dict(zip(header, cells, strict=True))


def _csv_problem(error: csv.Error, first: int, last: int) -> str:
    if "end of data" in str(error):
        return f"a quotation mark that opens in line {first} is never closed, so lines {first} to {last} cannot be read"
    return f"not CSV (lines {first} to {last}: {error}). Write a quotation mark inside a quoted cell twice"
