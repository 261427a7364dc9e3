"""What a user's rows say is what is trained: nothing is dropped, cut or guessed in silence.

Each test stands for a kind of data file that was trained wrongly, without a word, before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowvram_chat.data.dataset import load_rows
from lowvram_chat.data.sources import open_source
from lowvram_chat.data.template import set_template
from lowvram_chat.data.tokenize import tokenize
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data
from tests.marked import marked, marked_rows, preview_of, problem_of
from tests.samples import write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|endoftext|>"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
CHAT = [USER, ANSWER]
TRAINED = f"user: Hi\nassistant:[[ Hello.{EOS}]]"

ROWS_AND_TRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "a system column of ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        },
        f"system: Be brief.\n{TRAINED}",
    ),
    "a system prompt beside messages": (
        {"messages": CHAT, "system_prompt": "Be brief."},
        f"system: Be brief.\n{TRAINED}",
    ),
    "an empty system message": ({"messages": [{"role": "system", "content": ""}, *CHAT]}, TRAINED),
    "a null system message": ({"messages": [{"role": "system", "content": None}, *CHAT]}, TRAINED),
    "alpaca's system and history": (
        {
            "system": "You cook.",
            "history": [["Eggs?", "Eight minutes."]],
            "instruction": "Soft?",
            "input": "",
            "output": "Five.",
        },
        f"system: You cook.\nuser: Eggs?\nassistant: Eight minutes.{EOS}\nuser: Soft?\nassistant:[[ Five.{EOS}]]",
    ),
    "alpaca's input as a number": (
        {"instruction": "Double it.", "input": 21, "output": 42},
        f"user: Double it.\n\n21\nassistant:[[ 42{EOS}]]",
    ),
    "a context beside alpaca's columns": (
        {"instruction": "Who?", "context": "By Ada.", "output": "Ada."},
        f"user: Who?\n\nBy Ada.\nassistant:[[ Ada.{EOS}]]",
    ),
    "weight 0": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        f"user: Hi\nassistant: Hello.{EOS}\n{TRAINED}",
    ),
    "train: false": (
        {"messages": [USER | {"train": False}, ANSWER | {"train": False}, USER, ANSWER | {"train": True}]},
        f"user: Hi\nassistant: Hello.{EOS}\n{TRAINED}",
    ),
    "parts of text": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]},
            ]
        },
        TRAINED,
    ),
    "an answer inside the prompt": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        f"user: Hi\nassistant: Hello.{EOS}\n{TRAINED}",
    ),
    "a system column beside an empty system message": (
        {"messages": [{"role": "system", "content": ""}, *CHAT], "system": "Be brief."},
        f"system: Be brief.\n{TRAINED}",
    ),
    "an answer that is JSON": (
        {"prompt": "List people", "completion": '[{"name": "Bob"}]'},
        f'user: List people\nassistant:[[ [{{"name": "Bob"}}]{EOS}]]',
    ),
    "an answer that is JSON of messages": (
        {"prompt": "Give me JSON", "completion": '[{"role": "assistant", "content": "Hi"}]'},
        f'user: Give me JSON\nassistant:[[ [{{"role": "assistant", "content": "Hi"}}]{EOS}]]',
    ),
    "numbers as they are written": (
        {"instruction": "Round", "input": 1.50, "output": 2},
        f"user: Round\n\n1.5\nassistant:[[ 2{EOS}]]",
    ),
    "a measured loss": ({"messages": [USER, ANSWER | {"loss": 2.37}]}, TRAINED),
    "columns that are there but empty": ({"prompt": "Hi", "completion": "Hello.", "messages": None}, TRAINED),
    "messages as text of a prompt and a completion": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        TRAINED,
    ),
}


@pytest.mark.parametrize("name", ROWS_AND_TRAINED)
def test_a_row_is_trained_as_it_says(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row, expected = ROWS_AND_TRAINED[name]
    assert marked_rows(tmp_path, [row], tokenizer) == [expected]


def test_weight_0_is_kept_to_when_the_loss_is_on_all(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}
    [text] = marked_rows(tmp_path, [row], tokenizer, loss_on="all")
    assert text == f"us[[er: Hi\nassistant:]] Hello.{EOS}[[\nuser: Hi\nassistant: Hello.{EOS}]]"


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a call of a tool": (
        {"messages": [USER, ANSWER | {"tool_calls": [{"id": "c1"}]}, USER, ANSWER]},
        "message 2 calls a tool",
    ),
    "a part that is no text": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "message 1 has a part of the type 'image_url'",
    ),
    "an empty prompt": ({"prompt": [], "completion": [ANSWER]}, "'prompt' is empty"),
    "an answer without a visible character": (
        {"messages": [USER, ANSWER | {"content": "\u200b\ufeff"}]},
        "message 2 is empty",
    ),
    "half a weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "message 2 has 'weight': 0.5"),
    "an input that is a list": (
        {"instruction": "Largest?", "input": ["ant"], "output": "ant"},
        "'input' is not text but a list",
    ),
    "two system messages": (
        {"messages": [{"role": "system", "content": "A"}, *CHAT], "system": "B"},
        "there are two system messages",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_row_that_cannot_be_trained_as_it_says_is_a_bad_row(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row, problem = UNUSABLE[name]
    assert f"rows.jsonl:1: {problem}" in problem_of(tmp_path, row, tokenizer)


OTHER_TASKS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "KTO": ([{"messages": CHAT, "label": True}, {"messages": CHAT, "label": False}], "rows.jsonl:2: 'label' is False"),
    "KTO from a spreadsheet": (
        [
            {"prompt": "Hi", "completion": "Yes", "label": "TRUE"},
            {"prompt": "Hi", "completion": "No", "label": "FALSE"},
        ],
        "rows.jsonl:2: 'label' is FALSE",
    ),
    "KTO as numbers": ([{"prompt": "Hi", "completion": "No", "label": 0.0}], "'label' is 0.0"),
    "KTO as text": (
        [{"prompt": "Hi", "completion": "No", "label": "false"}],
        "Keep only the rows whose 'label' is true",
    ),
    "DPO": ([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}], "'chosen' and 'rejected' are preference data"),
    "DPO in ShareGPT": (
        [{"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"value": "a"}, "rejected": {"value": "b"}}],
        "preference data (DPO)",
    ),
    "flat OpenAssistant": (
        [{"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi"}],
        "each row is one message of a tree",
    ),
}


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_data_for_another_task_is_refused_with_what_to_do(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, words = OTHER_TASKS[name]
    with pytest.raises(DataError) as caught:
        preview_of(
            write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, loss_on="all" if "flat" in name else "assistant"
        )
    assert words in str(caught.value)


def test_messages_with_the_pair_beside_them_are_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": CHAT, "chosen": CHAT, "rejected": CHAT}
    assert marked_rows(tmp_path, [row], tokenizer) == [TRAINED]


def test_columns_and_message_keys_that_are_not_used_are_counted_and_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"messages": [USER, ANSWER | {"reasoning_content": "so"}], "id": 1, "tools": []},
        {"messages": [USER | {"name": None}, ANSWER], "id": 2},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    facts = tokenize(open_source(str(path), split="train", subset=None), tokenizer, Data(), None).facts
    assert facts.columns_not_used == {"id": 2, "messages.reasoning_content": 1}
    assert "columns not used, with the number of rows: id (2), messages.reasoning_content (1)" in caplog.text


def test_a_row_of_another_format_names_both(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": CHAT},
        {"instruction": "Hi", "output": "Hello."},
        {"text": "a"},
        {"messages": CHAT},
    ]
    preview = preview_of(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer)
    assert [example.split(": ", 1)[1].split(".")[0] for example in preview.facts.bad_examples] == [
        f"this row has the format {name}, but the first row of the file has the format messages"
        for name in ("alpaca", "text")
    ]


def test_a_missing_column_is_named_with_those_that_are_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"instruction": "Hi", "output": "Hello."}, {"instruction": "Bye", "response": "Bye."}]
    [example] = preview_of(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer).facts.bad_examples
    assert example.endswith("rows.jsonl:2: 'output' is missing; the row has 'instruction', 'response'")


def test_each_file_has_a_format_of_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    write_jsonl(tmp_path / "b.jsonl", [{"instruction": "Hi", "output": "Hello."}])
    assert marked(preview_of(first.with_name("*.jsonl"), tokenizer)) == [TRAINED, TRAINED]


def test_a_named_format_is_that_of_the_training_rows_and_not_of_a_set_that_comes_with_the_package(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Once upon a time"}])
    data = Data(source=str(path), format="text", loss_on="all", eval_source="builtin:chitchat-held-out", eval_limit=3)
    rows = load_rows(data, tokenizer, 0)
    assert rows.held_out is not None
    assert (len(rows.train), len(rows.held_out)) == (1, 3)


@pytest.mark.parametrize("text", ["    def f():\n        return 1\n\n", "\n\nA verse\n  and another\n"])
def test_plain_text_keeps_its_blanks(text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = preview_of(write_jsonl(tmp_path / "rows.jsonl", [{"text": text}]), tokenizer, loss_on="all").rows
    assert row.text == text + EOS


def test_a_template_that_raises_makes_a_bad_row_with_its_own_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "alternates.jinja"
    path.write_text(
        "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Roles must alternate') }}{%- endif -%}"
        "{%- if m.role == 'assistant' -%}{% generation %}A: {{ m.content + eos_token }}{% endgeneration %}"
        "{%- else -%}U: {{ m.content }}\n{% endif -%}{%- endfor -%}",
        encoding="utf-8",
    )
    set_template(tokenizer, str(path), "assistant")
    rows = [{"messages": CHAT}, {"messages": [USER, USER, ANSWER]}, {"messages": CHAT}]
    preview = preview_of(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer)
    assert marked(preview) == [f"U: Hi\n[[A: Hello.{EOS}]]"] * 2
    assert preview.facts.bad_examples == [
        f"{tmp_path / 'rows.jsonl'}:2: the chat template refuses it: Roles must alternate"
    ]


def test_all_tokens_of_the_last_character_carry_loss_and_so_does_the_end_after_the_marks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "end_outside.jinja"
    path.write_text(
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "A: {% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}\n"
        "{%- else -%}U: {{ m.content }}\n{% endif -%}{%- endfor -%}",
        encoding="utf-8",
    )
    set_template(tokenizer, str(path), "assistant")
    row = {
        "messages": [USER, {"role": "assistant", "content": "Hello 🙂"}, USER, {"role": "assistant", "content": "東京"}]
    }
    [text] = marked_rows(tmp_path, [row], tokenizer)
    assert "�" not in text
    assert text.count("🙂") == 1
    assert f"🙂{EOS}]]" in text
    assert f"東京{EOS}]]" in text


def test_a_share_of_bad_rows_may_be_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*[{"messages": CHAT}] * 97, *[{"messages": [USER]}] * 3])

    def read(share: float) -> int:
        source = open_source(str(path), split="train", subset=None)
        return tokenize(source, tokenizer, Data(max_bad_rows=share), None).facts.bad_rows

    assert read(0.03) == 3
    with pytest.raises(DataError, match=r"3 of 100 rows cannot be used, and data\.max_bad_rows is 0\.02"):
        read(0.02)


def test_a_refusal_counts_all_bad_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [USER]} if number % 3 else {"messages": CHAT} for number in range(327)]
    source = open_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)), split="train", subset=None)
    with pytest.raises(DataError, match=r"218 of 327 rows cannot be used(.|\n)*set data\.max_bad_rows=218") as caught:
        tokenize(source, tokenizer, Data(), None)
    assert len(str(caught.value).splitlines()) == 12
    assert str(caught.value).endswith("and 208 more")


def test_nothing_is_said_to_be_kept_where_nothing_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER]}])), split="train", subset=None)
    with pytest.raises(DataError):
        tokenize(source, tokenizer, Data(), None)
    assert "kept in" not in caplog.text


def test_duplicates_are_counted_and_those_on_both_sides_are_told_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    other = {"messages": [USER | {"content": "What?"}, ANSWER]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*[{"messages": CHAT}] * 9, other])
    prepared = load_rows(Data(source=str(path), eval_fraction=0.3), tokenizer, 0)
    assert prepared.facts.duplicates == 8
    assert prepared.in_both in (2, 3)  # all of those held out that are not the odd one
    assert "8 conversations with the same text as an earlier one" in caplog.text
    assert "that are held out are trained on, too" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"eval_source": "ROWS"}])
def test_a_file_has_no_splits(settings: dict[str, str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"files have no splits\. Set data\.eval_split=null, and data\.eval_fraction="):
        load_rows(Data(source=str(path), eval_split="test_sft"), tokenizer, 0)
