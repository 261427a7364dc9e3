"""Files are read as they come, and what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lowvram_chat.data import text_files
from lowvram_chat.data.parsers import parse_file, parse_json
from lowvram_chat.data.raw_rows import BadRow
from lowvram_chat.data.sources import open_source
from lowvram_chat.errors import DataError

ROWS = [{"text": f"é {number}"} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstandard(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def read(path: Path) -> list[Any]:
    return [row for _, row in parse_file(path)]


def bad_rows(path: Path) -> list[str]:
    """Return the place, without its folder, and the problem of each bad row."""
    return [f"{Path(where).name}: {row.reason}" for where, row in parse_file(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard)])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_compressed_file_is_read(name: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    text = {".jsonl": LINES, ".json": json.dumps(ROWS), ".csv": "text\n" + "".join(f"{r['text']}\n" for r in ROWS)}
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(text[Path(name).suffix].encode()))
    assert [row for _, row in open_source(str(path), split="train", subset=None).rows()] == ROWS


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard)])
def test_a_compressed_file_that_is_cut_off_names_the_line_where_it_stops(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    packed = pack("".join(f'{{"text": "{hash(str(number))}"}}\n' for number in range(5000)).encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl.*after line \d+"):
        read(path)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard)])
def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "ALWAYS_UNPACKED", 1 << 20)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(b" " * (1 << 26)))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        read(path)


def test_a_line_that_is_too_long_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_ROW_CHARACTERS", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + 350 * "b" + '"}\n{"text": "c"}\n', encoding="utf-8")
    assert bad_rows(path) == ["rows.jsonl:2: longer than 64 million characters"]
    assert read(path)[::2] == [{"text": "a"}, {"text": "c"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_text_with_a_byte_order_mark_is_read(name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = {"rows.jsonl": LINES, "rows.json": json.dumps(ROWS, ensure_ascii=False), "rows.csv": "text\né 0\né 1\né 2\n"}
    path.write_text(text[name], encoding=encoding)
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(LINES.encode()), "is a compressed file. Rename it to end in .gz"),
        (zstandard(LINES.encode()), "is a compressed file. Rename it to end in .zst"),
        (LINES.encode("utf-32"), "is neither UTF-8 text, nor UTF-16"),
        (LINES.encode("utf-16-le"), "is neither UTF-8 text, nor UTF-16"),
    ],
    ids=["gzip", "zstandard", "utf-32", "utf-16 without a mark"],
)
def test_a_file_in_another_encoding_says_so(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_byte_order_mark_inside_a_file_is_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(2 * LINES.encode("utf-8-sig"))
    assert read(path) == 2 * ROWS


def test_utf16_that_is_cut_off_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode("utf-16")[:-1])
    with pytest.raises(DataError, match="not valid UTF-16"):
        read(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n\n" + json.dumps(ROWS)])
def test_rows_are_read_by_what_the_file_holds(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read(path) == ROWS


@pytest.mark.parametrize("key", ["data", "conversations", "rows"])
def test_an_object_around_the_list_of_rows_is_read(key: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, key: ROWS}), encoding="utf-8")
    assert read(path) == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_by_itself_is_read(indent: int | None, tmp_path: Path) -> None:
    path, row = tmp_path / "rows.json", {"conversations": [{"from": "human", "value": "Hi"}]}
    path.write_text(json.dumps(row, indent=indent), encoding="utf-8")
    assert read(path) == [row]


@pytest.mark.parametrize(
    "document",
    [
        {"train": [{"text": "a"}], "test": [{"text": "b"}]},
        {"data": [{"text": "a"}], "prompt": "x", "completion": "y", "messages": [1]},
        {"version": 1, "title": "none"},
        {"columns": ["text"], "index": [0], "data": [["a"]]},
    ],
)
def test_an_object_of_which_a_part_would_be_dropped_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    if "messages" in document:
        assert read(path) == [document]  # a row, with a column that is not used
        return
    with pytest.raises(DataError, match="holds an object, not a list of rows"):
        read(path)


def test_a_json_file_that_is_cut_off_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1)[:-20], encoding="utf-8")
    with pytest.raises(DataError, match=r"line \d+, column \d+.*may be cut off"):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1', "a comma is missing at column 8, where the file or line may be cut off"),
        ('{"a" 1}', "a colon is missing at column 6"),
        ("{'a': 1}", "a key in double quotation marks is missing"),
        ('{"a": ' + 5000 * "9" + "}", "a number has thousands of digits"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (5000 * "[" + 5000 * "]", "nested too deeply"),
    ],
)
def test_json_problems_are_told_in_words_of_the_file(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="JSON") as caught:
        parse_json(text)
    assert words in str(caught.value)


CSV_FILES = {
    "a comma outside of quotation marks": (
        "instruction,output\nSay hi,Hello, friend\nBye,Bye.\n",
        ["rows.csv:2: 3 cells, but the header has 2 columns. Put text with commas or line ends into quotation marks"],
    ),
    "a missing cell": ("a,b\n1\n2,3\n", ["rows.csv:2: 1 cells, but the header has 2 columns."]),
    "an open quotation mark": (
        'a,b\n1,"Hello.\n2,3\n4,5\n',
        ["rows.csv:4: a quotation mark that opens in line 2 is never closed, so lines 2 to 4 cannot be read"],
    ),
    "a quotation mark that a later one closes": (
        'a,b\n1,"Hello.\n"2",3\n4,5\n',
        ["rows.csv:3: not CSV (lines 2 to 3: ',' expected after '\"'). Write a quotation mark"],
    ),
}


@pytest.mark.parametrize("name", CSV_FILES)
def test_a_csv_row_that_is_not_what_it_seems_is_a_bad_row(name: str, tmp_path: Path) -> None:
    text, expected = CSV_FILES[name]
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    found = bad_rows(path)
    assert len(found) == len(expected)
    assert all(problem.startswith(words) for problem, words in zip(found, expected, strict=True))


def test_a_csv_cell_with_an_escaped_emoji_is_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\nWhat is \\ud83d\\udc80?\n", encoding="ascii")
    assert read(path) == [{"text": "What is \\ud83d\\udc80?"}]


@pytest.mark.parametrize(
    ("text", "words"), [("a,a\n1,2\n", "two columns are named 'a'"), ("a;b\n1;2\n", "the header has no commas")]
)
def test_a_csv_header_that_cannot_be_used_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_damaged_parquet_file_names_the_last_good_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"row {number} " * 50} for number in range(3000)])
    pyarrow.parquet.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40_000] = b"\xff" * 40_000
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"rows\.parquet: the file is damaged after row \d+"):
        read(path)


def test_a_number_keeps_the_text_that_it_has_in_the_file() -> None:
    numbers = parse_json("[1.50, 1E3, 12345678901234567.25, 7]")
    assert isinstance(numbers, list)
    assert [str(number) for number in numbers] == ["1.50", "1E3", "12345678901234567.25", "7"]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('[1]\n{"text": "a\u2028b"}\n', encoding="utf-8")
    assert [row for row in read(path) if not isinstance(row, BadRow)] == [{"text": "a\u2028b"}]


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        read(tmp_path / "rows.parquet")


def test_a_date_that_python_has_not_is_no_traceback(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "when": pyarrow.array([10**15], pyarrow.timestamp("ms"))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read(tmp_path / "rows.parquet")


def test_files_have_another_fingerprint_than_their_concatenation(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "parts" / f"{name}.csv").write_text(f"text\n{name}\n", encoding="utf-8")
    (tmp_path / "all.csv").write_text("text\na\ntext\nb\n", encoding="utf-8")
    (tmp_path / "all.jsonl").write_text("text\na\ntext\nb\n", encoding="utf-8")
    names = ("parts/*.csv", "all.csv", "all.jsonl")
    sources = [open_source(str(tmp_path / name), split="train", subset=None) for name in names]
    assert len({source.fingerprint for source in sources}) == 3


def test_an_empty_file_among_others_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    assert len(list(open_source(str(tmp_path / "*.jsonl"), split="train", subset=None).rows())) == 3
    assert "b.jsonl: has no rows" in caplog.text


def test_a_folder_is_refused_with_the_names_of_its_files(tmp_path: Path) -> None:
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(LINES, encoding="utf-8")
    with pytest.raises(DataError, match=r"is a folder\. It holds test\.jsonl, train\.jsonl\. Name its files"):
        open_source(str(tmp_path), split="train", subset=None)
