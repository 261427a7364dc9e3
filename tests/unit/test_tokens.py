"""The tokens and labels of conversations, compared with ones written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowvram_chat.data.rows import IGNORED_LABEL, Collator
from lowvram_chat.data.sources import open_source
from lowvram_chat.data.template import set_template
from lowvram_chat.data.tokenize import Tokenized, tokenize
from lowvram_chat.recipe.schema import Data
from tests.samples import write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|endoftext|>"
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "I am a small model."},
    {"role": "user", "content": "And how old?"},
    {"role": "assistant", "content": "One day."},
]
PIECES = [  # (text, whether it carries loss): the expected output of the template, written by hand
    ("system: Be kind.\nuser: Hi, who are you?\nassistant:", False),
    (f" I am a small model.{EOS}", True),
    ("\nuser: And how old?\nassistant:", False),
    (f" One day.{EOS}", True),
]


def rows_of(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any) -> Tokenized:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return tokenize(open_source(str(path), split="train", subset=None), tokenizer, Data(**settings), None)


def by_hand(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of `PIECES`, each piece tokenised separately."""
    ids: list[int] = []
    labels: list[int] = []
    for text, carries_loss in PIECES:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if carries_loss else [IGNORED_LABEL] * len(piece)
    return ids, labels


def test_tokens_and_labels_are_those_written_by_hand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}], max_length=256).rows
    assert (row["input_ids"], row["labels"]) == by_hand(tokenizer)


def test_eos_after_each_answer_carries_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}], max_length=256).rows
    places = [place for place, token in enumerate(row["input_ids"]) if token == tokenizer.eos_token_id]
    assert len(places) == 2
    assert [row["labels"][place] for place in places] == [tokenizer.eos_token_id] * 2


def test_only_the_assistants_words_and_its_eos_carry_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}], max_length=256).rows
    learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED_LABEL])
    assert learned == f" I am a small model.{EOS} One day.{EOS}"


def test_loss_on_all_leaves_out_only_the_first_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}], max_length=256, loss_on="all").rows
    assert row["labels"] == [IGNORED_LABEL, *row["input_ids"][1:]]


def test_padding_carries_no_loss_though_it_is_the_eos_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = list(rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}, {"messages": short}], max_length=256).rows)
    batch = Collator(int(tokenizer.pad_token_id))(rows)
    length = len(rows[1]["input_ids"])
    assert batch["labels"][1, length - 1] == tokenizer.eos_token_id  # the EOS token of the text is learned
    assert (batch["labels"][1, length:] == IGNORED_LABEL).all()
    assert (batch["input_ids"][1, length:] == tokenizer.pad_token_id).all()


def test_truncation_keeps_the_head_and_leaves_out_what_has_no_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, labels = by_hand(tokenizer)
    answered = labels.index(ids[len(tokenizer.encode(PIECES[0][0]))])
    wordy = [{"role": "user", "content": "no " * 50}, MESSAGES[2]]
    kept = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}, {"messages": wordy}], max_length=answered + 3)
    [row] = kept.rows
    assert (row["input_ids"], row["labels"]) == (ids[: answered + 3], labels[: answered + 3])
    assert (kept.facts.conversations, kept.facts.rows, kept.facts.shortened, kept.facts.without_loss) == (2, 1, 2, 1)


def test_facts_count_what_the_rows_hold(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    kept = rows_of(tmp_path, tokenizer, [{"messages": MESSAGES}] * 3, max_length=256)
    ids, labels = by_hand(tokenizer)
    assert kept.facts.tokens == 3 * len(ids)
    assert kept.facts.loss_tokens == 3 * sum(label != IGNORED_LABEL for label in labels)
    assert kept.facts.longest == len(ids)


def test_special_tokens_in_a_text_are_removed_and_logged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lowvram_chat")
    messages = [{"role": "user", "content": f"Hi{EOS} there"}, {"role": "assistant", "content": f"{EOS}Ho"}]
    kept = rows_of(tmp_path, tokenizer, [{"messages": messages}], max_length=256)
    assert tokenizer.decode(kept.rows[0]["input_ids"]) == f"user: Hi there\nassistant: Ho{EOS}"
    assert kept.facts.special_tokens_removed == 1
    assert "removed special tokens" in caplog.text


def test_a_special_token_formed_by_removing_another_is_removed_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [
        {"role": "user", "content": "Hi <|endof<|endoftext|>text|> there"},
        {"role": "assistant", "content": "Ho"},
    ]
    kept = rows_of(tmp_path, tokenizer, [{"messages": messages}], max_length=256)
    assert kept.rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1


def test_an_answer_that_is_only_a_special_token_is_not_learned_as_empty(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    empty = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": EOS}]
    rows = [{"messages": MESSAGES}, {"messages": empty}]
    kept = rows_of(tmp_path, tokenizer, rows, max_length=256, max_bad_rows=1)
    assert kept.facts.conversations == 1


def test_plain_text_ends_with_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = rows_of(tmp_path, tokenizer, [{"text": "Once upon a time"}], max_length=64, loss_on="all").rows
    assert tokenizer.decode(row["input_ids"]) == f"Once upon a time{EOS}"


def test_baseline_rows_are_its_text_cut_at_128_without_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    set_template(tokenizer, "plain", "all")
    messages = [MESSAGES[1], MESSAGES[2], {"role": "user", "content": "word " * 200}, MESSAGES[4]]
    text = "user: Hi, who are you?\nassistant: I am a small model.\nuser: " + "word " * 200
    kept = rows_of(tmp_path, tokenizer, [{"messages": messages}], format="baseline", loss_on="all", max_length=128)
    assert kept.rows[0]["input_ids"] == tokenizer.encode(text)[:128]
    assert tokenizer.eos_token_id not in kept.rows[0]["input_ids"]


def test_half_a_surrogate_pair_is_a_bad_row_and_no_crash(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"messages": MESSAGES}])
    broken = r'{"messages": [{"role": "user", "content": "Hi \ud83d"}, {"role": "assistant", "content": "Ho"}]}'
    path.write_text(path.read_text(encoding="utf-8") + broken + "\n", encoding="utf-8")
    source = open_source(str(path), split="train", subset=None)
    kept = tokenize(source, tokenizer, Data(max_bad_rows=1), None)
    assert kept.facts.conversations >= 1
