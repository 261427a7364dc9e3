"""Token rows are cached under everything that they depend on, and made again when the cache is damaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowvram_chat.data import encode as encode_module
from lowvram_chat.data import reader as reader_module
from lowvram_chat.data import rows as rows_module
from lowvram_chat.data import tokenize as tokenize_module
from lowvram_chat.data.rows import TokenRow
from lowvram_chat.data.sources import open_source
from lowvram_chat.data.template import set_template
from lowvram_chat.data.tokenize import Tokenized, tokenize
from lowvram_chat.recipe.schema import Data
from tests.samples import conversations, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Give each test an empty cache, and record the log of the package."""
    caplog.set_level(logging.INFO, logger="lowvram_chat")
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", conversations(6, seed=0))


def read(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, **settings: Any) -> Tokenized:
    source = open_source(str(path), split="train", subset=None)
    return tokenize(source, tokenizer, Data.model_validate({"max_length": 64} | settings), limit)


def test_the_second_reading_comes_from_the_cache_and_is_logged(
    file: Path, tokenizer: PreTrainedTokenizerBase, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = read(file, tokenizer)
    assert "kept in" in caplog.text
    assert str(own_cache) in caplog.text
    caplog.clear()
    second = read(file, tokenizer)
    assert "from the cache" in caplog.text
    assert "tokenising" not in caplog.text
    assert second.facts == first.facts
    assert second.rows["labels"][:] == first.rows["labels"][:]


@pytest.mark.parametrize(
    "change", [{"max_length": 32}, {"loss_on": "all"}, {"overflow": "split"}, {"limit": 3}, {"format": "messages"}]
)
def test_another_setting_is_another_entry(
    file: Path, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    read(file, tokenizer)
    caplog.clear()
    read(file, tokenizer, **change)
    assert "tokenising" in caplog.text


def test_another_content_under_the_same_name_is_another_entry(
    file: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    read(file, tokenizer)
    write_jsonl(file, conversations(6, seed=1))
    caplog.clear()
    read(file, tokenizer)
    assert "tokenising" in caplog.text


def test_another_template_is_another_entry(
    file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    read(file, tokenizer)
    path = tmp_path / "loud.jinja"
    text = str(tokenizer.chat_template).replace('"assistant:"', '"ASSISTANT:"')
    path.write_text(text, encoding="utf-8")
    set_template(tokenizer, str(path), "assistant")
    caplog.clear()
    read(file, tokenizer)
    assert "tokenising" in caplog.text


def test_another_vocabulary_is_another_entry(
    file: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    read(file, tokenizer)
    tokenizer.add_tokens(["the cat"])
    caplog.clear()
    read(file, tokenizer)
    assert "tokenising" in caplog.text


def test_another_end_of_text_token_is_another_entry(
    file: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    first = read(file, tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(65)
    caplog.clear()
    assert read(file, tokenizer).rows["input_ids"][:] != first.rows["input_ids"][:]
    assert "tokenising" in caplog.text


def test_another_version_of_this_code_is_another_entry(
    file: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read(file, tokenizer)
    monkeypatch.setattr(tokenize_module, "CACHE_VERSION", tokenize_module.CACHE_VERSION + 1)
    caplog.clear()
    read(file, tokenizer)
    assert "tokenising" in caplog.text


@pytest.mark.parametrize("ending", ["arrow", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_entry_is_made_again(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    own_cache: Path,
    ending: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = read(file, tokenizer).rows["input_ids"][:]
    [path] = own_cache.glob(f"*.{ending}")
    content = path.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.unlink()  # rows that were already read stay memory-mapped
    path.write_bytes({"cut": content[:middle], "changed": changed, "emptied": b""}[damage])
    caplog.clear()
    assert read(file, tokenizer).rows["input_ids"][:] == expected
    assert "damaged and are made again" in caplog.text


@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_half_an_entry_is_made_again(
    file: Path, tokenizer: PreTrainedTokenizerBase, own_cache: Path, ending: str
) -> None:
    expected = read(file, tokenizer).rows["input_ids"][:]
    [path] = own_cache.glob(f"*.{ending}")
    path.unlink()
    assert read(file, tokenizer).rows["input_ids"][:] == expected


def kept(cache: Path) -> list[str]:
    """Return the suffixes of the files in the cache, except lock files, which are always empty."""
    return sorted(path.suffix for path in cache.glob("*") if path.suffix != ".lock")


def test_a_failed_reading_leaves_nothing_in_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, own_cache: Path
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [*conversations(3, 0), {"messages": []}])
    with pytest.raises(ValueError, match="the conversation is empty"):
        read(path, tokenizer)
    assert not kept(own_cache)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that takes ten blocks to write and contains unusable rows."""
    monkeypatch.setattr(tokenize_module, "CONVERSATIONS_PER_WRITE", 10)
    monkeypatch.setattr(encode_module, "CONVERSATIONS_PER_BATCH", 8)
    raw = conversations(100, seed=2)
    for place in (3, 40, 41, 99):
        raw.insert(place, {"messages": []})
    return write_jsonl(tmp_path / "many.jsonl", raw)


def interrupt(monkeypatch: pytest.MonkeyPatch, conversation: int) -> None:
    """Raise KeyboardInterrupt when the rows of a conversation are made."""
    original, count = rows_module.cut_to_length, iter(range(10**6))

    def cut(tokens: list[int], labels: list[int], max_length: int, overflow: str) -> Iterator[TokenRow]:
        if next(count) == conversation:
            raise KeyboardInterrupt
        return original(tokens, labels, max_length, overflow)

    monkeypatch.setattr(reader_module, "cut_to_length", cut)


@pytest.mark.parametrize("conversation", [0, 5, 37, 80])
def test_an_interrupted_reading_continues_where_it_stopped(
    conversation: int,
    many: Path,
    tokenizer: PreTrainedTokenizerBase,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, conversation)
        with pytest.raises(KeyboardInterrupt):
            read(many, tokenizer, max_bad_rows=9)
    assert ".arrow" not in kept(own_cache)
    again = read(many, tokenizer, max_bad_rows=9)
    assert ("continuing after" in caplog.text) == (conversation > 10)
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", str(own_cache / "other"))
    whole = read(many, tokenizer, max_bad_rows=9)
    assert again.facts == whole.facts
    assert again.facts.bad_rows == 4
    assert again.rows.to_dict() == whole.rows.to_dict()
    assert kept(own_cache) == ["", ".arrow", ".json"]  # "" is the other cache


def test_half_a_block_at_the_end_of_an_interrupted_reading_is_written_again(
    many: Path, tokenizer: PreTrainedTokenizerBase, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 50)
        with pytest.raises(KeyboardInterrupt):
            read(many, tokenizer, max_bad_rows=9)
    [partial] = own_cache.glob("*.partial")
    with partial.open("ab") as unfinished:
        unfinished.write(partial.read_bytes()[-300:-100])
    again = read(many, tokenizer, max_bad_rows=9)
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", str(own_cache / "other"))
    assert again.rows.to_dict() == read(many, tokenizer, max_bad_rows=9).rows.to_dict()


def test_a_damaged_unfinished_reading_starts_again(
    many: Path,
    tokenizer: PreTrainedTokenizerBase,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 50)
        with pytest.raises(KeyboardInterrupt):
            read(many, tokenizer, max_bad_rows=9)
    [partial] = own_cache.glob("*.partial")
    content = partial.read_bytes()
    partial.write_bytes(content[:500] + bytes([content[500] ^ 255]) + content[501:])
    assert read(many, tokenizer, max_bad_rows=9).facts.conversations == 100
    assert "continuing after" not in caplog.text
