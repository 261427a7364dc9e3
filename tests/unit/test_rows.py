"""Cutting to length loses no label, held-out rows are whole conversations, and batches are padded rectangles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_chat.data.dataset import PreparedRows, load_rows
from lowvram_chat.data.rows import IGNORED_LABEL, Collator, TokenRow, cut_to_length
from lowvram_chat.recipe.schema import Data
from tests.samples import conversations, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELLED = st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1, max_size=80)


@given(LABELLED, st.integers(8, 32))
def test_split_loses_no_text_and_no_labelled_token(tokens: list[tuple[int, bool]], max_length: int) -> None:
    ids = [number * 100 + place for place, (number, _) in enumerate(tokens)]
    labels = [token if carries else IGNORED_LABEL for token, (_, carries) in zip(ids, tokens, strict=True)]
    rows = list(cut_to_length(ids, labels, max_length, "split"))
    assert all(1 <= len(row.input_ids) == len(row.labels) <= max_length for row in rows)
    assert rows[0].input_ids + [token for row in rows[1:] for token in row.input_ids[1:]] == ids
    assert [label for row in rows for label in row.labels if label != IGNORED_LABEL] == [
        label for label in labels[1:] if label != IGNORED_LABEL
    ]


@given(LABELLED, st.integers(8, 32))
def test_a_labelled_token_is_always_predicted_from_the_one_before_it(
    tokens: list[tuple[int, bool]], max_length: int
) -> None:
    ids = list(range(len(tokens)))
    labels = [token if carries else IGNORED_LABEL for token, (_, carries) in zip(ids, tokens, strict=True)]
    for row in cut_to_length(ids, labels, max_length, "split"):
        assert row.labels[0] == IGNORED_LABEL
        assert all(label in (IGNORED_LABEL, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@given(LABELLED, st.integers(8, 32))
def test_truncate_gives_one_row_that_is_the_head(tokens: list[tuple[int, bool]], max_length: int) -> None:
    ids = [number for number, _ in tokens]
    [row] = cut_to_length(ids, ids, max_length, "truncate")
    assert row == TokenRow(ids[:max_length], [IGNORED_LABEL, *ids[1:max_length]])


def rows_of(path: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 1, **settings: Any) -> PreparedRows:
    return load_rows(Data(source=str(path), max_length=16, overflow="split", **settings), tokenizer, seed)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "many.jsonl", conversations(40, seed=3))


def test_the_held_out_fraction_is_whole_conversations(many: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(many, tokenizer, eval_fraction=0.25)
    assert rows.held_out is not None
    training, held_out = set(rows.train["conversation"]), set(rows.held_out["conversation"])
    assert not training & held_out
    assert len(held_out) == 10
    assert len(rows.held_out) > 10  # windows of one conversation stay together
    assert len(rows.train) + len(rows.held_out) == rows.facts.rows


def test_the_held_out_fraction_follows_the_seed(many: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = []
    for seed in (1, 1, 2):
        rows = rows_of(many, tokenizer, seed, eval_fraction=0.25)
        assert rows.held_out is not None
        chosen.append(set(rows.held_out["conversation"]))
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("setting", [{"loss_on": "all"}, {"max_length": 24}, {"overflow": "truncate"}])
def test_the_same_conversations_are_held_out_whatever_the_loss_and_length(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, setting: dict[str, Any]
) -> None:
    long = [{"messages": [{"role": "user", "content": "no " * 60}, {"role": "assistant", "content": "y"}]}]
    path = write_jsonl(tmp_path / "r.jsonl", [*long, *conversations(20, 4), *long, *conversations(20, 5)])
    base: dict[str, Any] = {"source": str(path), "max_length": 16, "overflow": "truncate", "eval_fraction": 0.25}
    one = load_rows(Data.model_validate(base), tokenizer, 1)
    other = load_rows(Data.model_validate(base | setting), tokenizer, 1)
    assert other.held_out is not None
    # A conversation that was trained on may never be among those a later evaluation calls held out.
    assert not set(one.train["conversation"]) & set(other.held_out["conversation"])


def test_an_eval_limit_counts_conversations(many: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(many, tokenizer, eval_fraction=0.25, eval_limit=3)
    assert rows.held_out is not None
    assert len(set(rows.held_out["conversation"])) == 3


def test_a_fraction_of_one_conversation_leaves_nothing_to_train_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", conversations(1, 0))
    with pytest.raises(ValueError, match=r"data\.eval_fraction"):
        rows_of(path, tokenizer, eval_fraction=0.5)


def test_an_eval_source_is_held_out(many: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", conversations(5, seed=9))
    rows = rows_of(many, tokenizer, eval_source=str(other), eval_limit=4)
    assert rows.held_out is not None
    assert len(set(rows.held_out["conversation"])) == 4
    assert len(set(rows.train["conversation"])) == 40


def test_a_batch_is_padded_on_the_right_to_its_longest_row() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["real_tokens"] == 4
    assert "attention_mask" not in batch


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=5))
def test_loss_positions_are_the_places_before_the_labelled_tokens(rows: list[list[bool]]) -> None:
    raw = [
        {
            "input_ids": [100 * number + place for place in range(len(row))],
            "labels": [
                100 * number + place if carries and place else IGNORED_LABEL for place, carries in enumerate(row)
            ],
        }
        for number, row in enumerate(rows)
    ]
    batch = Collator(0)(raw)
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    assert batch["loss_positions"].numel() == sum(label != IGNORED_LABEL for row in raw for label in row["labels"])
    for position in batch["loss_positions"].tolist():
        assert ids[position].item() + 1 == labels[position + 1].item()
