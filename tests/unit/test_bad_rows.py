"""Unusable rows are reported with their place, counted, and skipped only as far as the recipe allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowvram_chat.data.sources import open_source
from lowvram_chat.data.tokenize import Tokenized, tokenize
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data
from tests.samples import conversations, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD = {"messages": [{"role": "user", "content": "Hi"}]}


def read(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, **settings: Any) -> Tokenized:
    source = open_source(str(path), split="train", subset=None)
    return tokenize(source, tokenizer, Data(max_length=64, **settings), limit)


def test_one_bad_row_stops_the_run_by_default_with_its_place(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [*conversations(2, 0), BAD, *conversations(2, 1)])
    with pytest.raises(DataError) as caught:
        read(path, tokenizer)
    assert f"{path}:3: no assistant turn" in str(caught.value)
    assert "data.max_bad_rows" in str(caught.value)


def test_bad_rows_are_skipped_up_to_the_limit_and_logged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [BAD, *conversations(3, 0), BAD])
    kept = read(path, tokenizer, max_bad_rows=2)
    assert (kept.facts.conversations, kept.facts.bad_rows) == (3, 2)
    assert "skipped 2 rows" in caplog.text
    assert f"{path}:5: no assistant turn" in caplog.text


def test_the_first_ten_bad_rows_are_listed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [*conversations(1, 0), *[BAD] * 30])
    with pytest.raises(DataError) as caught:
        read(path, tokenizer)
    listed = [line for line in str(caught.value).splitlines() if "no assistant turn" in line]
    assert [line.strip().split(": ")[0] for line in listed] == [f"{path}:{number}" for number in range(2, 12)]


def test_more_bad_rows_than_allowed_are_refused_also_from_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [*conversations(3, 0), BAD, BAD])
    assert read(path, tokenizer, max_bad_rows=2).facts.bad_rows == 2
    with pytest.raises(DataError, match="2 of 5 rows cannot be used"):
        read(path, tokenizer, max_bad_rows=1)


def test_a_line_that_is_not_json_counts_as_a_bad_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", conversations(2, 0))
    path.write_text("{oops\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"r\.jsonl:1: not JSON"):
        read(path, tokenizer)
    assert read(path, tokenizer, max_bad_rows=1).facts.conversations == 2


def test_empty_data_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no row to train on"):
        read(write_jsonl(tmp_path / "r.jsonl", []), tokenizer)


def test_data_without_any_loss_is_refused_with_the_reason(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [{"role": "user", "content": "no " * 90}, {"role": "assistant", "content": "yes"}]}]
    with pytest.raises(DataError, match=r"data\.max_length"):
        read(write_jsonl(tmp_path / "r.jsonl", rows), tokenizer)


def test_text_without_roles_asks_for_loss_on_all(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "Once upon a time"}])
    with pytest.raises(DataError, match=r"Set data\.loss_on=all"):
        read(path, tokenizer)


def test_a_limit_takes_the_first_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", conversations(9, 0))
    limited, whole = read(path, tokenizer, limit=4), read(path, tokenizer)
    assert limited.facts.conversations == 4
    assert limited.rows["input_ids"][:] == whole.rows["input_ids"][:4]


def test_bad_rows_after_the_limit_do_not_count(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [*conversations(3, 0), BAD])
    assert read(path, tokenizer, limit=3).facts.bad_rows == 0
