"""`preview` shows what would be trained, on the terminal and as JSON, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lowvram_chat import api, preview
from lowvram_chat.errors import UsageError
from tests.runs import Bench
from tests.samples import conversations, write_jsonl

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
LONG = {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "and so on " * 40}]}


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the JSON that the command prints last."""
    assert preview.main([*words, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return parsed


def test_rows_are_shown_as_they_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [CHAT, {"messages": []}, CHAT, LONG])
    assert preview.main([str(path), "data.max_length=64", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"--- {path}:1: 15 tokens, 5 with loss\nuser: Hi\nassistant:[[ Hello.<|endoftext|>]]\n" in shown
    assert shown.count("---") == 1
    for words in (
        "3 conversations in 3 rows",
        "1 conversation; truncation cuts off",
        "data.overflow=split would keep all of them, in",
        "rows that cannot be used: 1",
        "1 x the conversation is empty",
        "conversations with the same text as an earlier one: 1",
    ):
        assert words in shown, shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chats.jsonl"]


def test_the_json_holds_rows_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [CHAT | {"id": 7}, {"messages": []}, CHAT, LONG])
    found = document(capsys, str(path), "data.max_length=64", "data.eval_fraction=0.34")
    assert found["rows"][0] == {
        "text": "user: Hi\nassistant: Hello.<|endoftext|>",
        "trained": [" Hello.<|endoftext|>"],
        "tokens": 15,
        "loss_tokens": 5,
        "place": f"{path}:1",
    }
    counts = ("conversations", "rows_total", "bad_rows", "duplicates", "shortened", "without_loss")
    assert [found[name] for name in counts] == [3, 3, 1, 1, 1, 0]
    assert found["in_both"] in (0, 1)
    assert found["columns_not_used"] == {"id": 1}
    assert found["bad_rows_by_kind"] == {"the conversation is empty": 1}
    longest = found["lengths"]["longest"]
    assert found["share_cut"] == pytest.approx((longest - 64) / (15 + 15 + longest), abs=1e-4)
    assert sum(found["lengths"]["histogram"].values()) == 3


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = conversations(20, seed=5)
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*rows[:3], *conversations(4, seed=6)])
    assert document(capsys, str(train), f"data.eval_source={held_out}")["in_both"] == 3


def test_a_recipe_gives_the_settings_and_its_model_the_tokens(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = bench.file("r", data__max_length=16)
    found = document(capsys, str(bench.train_file), str(recipe), "--rows", "2")
    assert found["lengths"]["max_length"] == 16
    assert len(found["rows"]) == 2
    assert api.preview(bench.train_file, bench.recipe("r"), rows=1).facts.conversations == 64


def test_of_a_hub_dataset_only_the_first_rows_are_streamed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = 0

    def rows() -> Any:
        nonlocal read
        for number in range(10_000):
            read += 1
            yield {"messages": [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": "So."}]}

    def load(name: str, subset: str | None, *, split: str, streaming: bool = False) -> Any:
        assert (name, subset, split, streaming) == ("someone/chats", None, "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = document(capsys, "someone/chats")
    assert (found["conversations"], found["is_sample"]) == (1000, True)
    assert read < 2000


def test_two_recipes_are_refused() -> None:
    assert preview.main(["builtin:chitchat", "one.yaml", "two.yaml"]) == 2


def test_a_negative_number_of_rows_is_refused() -> None:
    assert preview.main(["builtin:chitchat", "--rows", "-1"]) == 2
    with pytest.raises(UsageError):
        api.preview("builtin:chitchat", rows=-1)
