"""Files, globs and lists of sources are read row by row, each row with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lowvram_chat.data.formats import READERS, detect_format
from lowvram_chat.data.sources import BadRow, Source, open_source
from lowvram_chat.errors import DataError, NotFoundError

ROWS = [{"instruction": f"Say {number}", "input": "", "output": f"é {number}"} for number in range(5)]


def save(path: Path, rows: list[dict[str, Any]] = ROWS, *, mark: bool = False) -> Path:
    """Write rows in the format of the file's suffix, with a byte-order mark if `mark` is true."""
    encoding = "utf-8-sig" if mark else "utf-8"
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding=encoding)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    elif path.suffix == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def opened(name: str | Path | list[str]) -> Source:
    return open_source([str(n) for n in name] if isinstance(name, list) else str(name), split="train", subset=None)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    assert [row for _, row in opened(save(tmp_path / f"rows.{ending}")).rows()] == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, ending: str) -> None:
    rows = [row for _, row in opened(save(tmp_path / f"rows.{ending}", mark=True)).rows()]
    assert rows == ROWS
    assert detect_format(rows[0], "x") == "alpaca"  # type: ignore[arg-type]


def test_a_source_can_be_read_twice(tmp_path: Path) -> None:
    source = opened(save(tmp_path / "rows.jsonl"))
    assert list(source.rows()) == list(source.rows())


def test_a_row_of_lines_is_placed_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n[1]\n', encoding="utf-8")
    placed = list(opened(path).rows())
    assert [where for where, _ in placed] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert isinstance(placed[1][1], BadRow)
    assert "not JSON" in placed[1][1].reason
    assert placed[2][1] == BadRow("not a JSON object")


def test_a_csv_row_over_several_lines_is_placed_within_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.csv", [{"text": "one\ntwo"}, {"text": "three"}])
    assert [(where, row) for where, row in opened(path).rows()] == [
        (f"{path}:3", {"text": "one\ntwo"}),
        (f"{path}:4", {"text": "three"}),
    ]


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    row = {"text": "word " * 60_000}
    assert [row for _, row in opened(save(tmp_path / "rows.csv", [row])).rows()] == [row]


def test_a_csv_row_with_too_many_cells_is_refused_or_read_by_a_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\na,b\n", encoding="utf-8")
    [(_, row)] = list(opened(path).rows())
    assert isinstance(row, BadRow) or READERS["text"](row).text == "a"


def test_a_glob_reads_all_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path / f"{name}.jsonl", [{"text": name}])
    save(tmp_path / "c.json", [{"text": "c"}])
    assert [row for _, row in opened(tmp_path / "*.jsonl").rows()] == [{"text": "a"}, {"text": "b"}]
    assert len(list(opened(tmp_path / "*.json*").rows())) == 3


def test_a_list_reads_all_its_sources(tmp_path: Path) -> None:
    names = [str(save(tmp_path / f"{name}.jsonl", [{"text": name}])) for name in "ba"]
    assert [row for _, row in opened(names).rows()] == [{"text": "b"}, {"text": "a"}]


def test_a_file_name_with_brackets_is_found(tmp_path: Path) -> None:
    assert len(list(opened(save(tmp_path / "chats [1].jsonl")).rows())) == len(ROWS)


def test_an_absolute_path_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file of that name or pattern"):
        opened(tmp_path / "missing")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "data/*.jsonl", "a/b/c", "imdb"])
def test_a_missing_file_is_refused_without_a_request_to_the_hub(name: str) -> None:
    with pytest.raises(NotFoundError, match="no file of that name or pattern"):
        opened(name)


def test_an_unknown_builtin_names_the_nearest() -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'builtin:chitchat'"):
        opened("builtin:chitchatt")


@pytest.mark.parametrize("name", ["builtin:chitchat", "builtin:chitchat-held-out"])
def test_the_builtin_conversations_are_usable_rows(name: str) -> None:
    number = 0
    for _, row in opened(name).rows():
        READERS["messages"](row)  # type: ignore[arg-type]
        number += 1
    assert number >= 100


def test_another_ending_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"'\.xlsx' are not read\. Use one of \.jsonl, \.json, \.csv, \.parquet"):
        opened(tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", b"{", "not JSON"),
        ("rows.json", b"\xff\xfe", "not JSON"),
        ("rows.json", b'{"word": "a"}', "holds an object, not a list of rows"),
        ("rows.parquet", b"text", "not a Parquet file"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(opened(tmp_path / name).rows())


def test_an_empty_list_of_sources_is_refused() -> None:
    with pytest.raises(DataError, match="the list is empty"):
        opened([])


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    one, same = save(tmp_path / "one.jsonl"), save(tmp_path / "same.jsonl")
    other = save(tmp_path / "other.jsonl", [*ROWS[:-1], ROWS[0]])
    assert opened(one).fingerprint == opened(same).fingerprint != opened(other).fingerprint


def test_the_fingerprint_of_a_list_depends_on_its_order(tmp_path: Path) -> None:
    names = [str(save(tmp_path / f"{name}.jsonl", [{"text": name}])) for name in "ab"]
    assert opened(names).fingerprint != opened(names[::-1]).fingerprint


@pytest.mark.parametrize(("name", "content"), [("r.jsonl", '{"text": "caf\xe9"}\n'), ("r.csv", "text\ncaf\xe9\n")])
def test_text_that_is_not_utf8_is_a_bad_row_and_never_changed_silently(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    [(_, row)] = list(opened(tmp_path / name).rows())
    assert isinstance(row, BadRow)
