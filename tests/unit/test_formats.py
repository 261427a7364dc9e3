"""Every format reads its examples, and the error for an unusable row says why."""

from __future__ import annotations

import re

import pytest

from lowvram_chat.data.formats import READERS, Conversation, check_readers, detect_format
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.recipe.schema import Data

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello there"}
SYSTEM = {"role": "system", "content": "Be kind"}
EXCHANGE = Conversation(messages=(USER, ANSWER))

EXAMPLES: dict[str, list[tuple[dict[str, object], Conversation]]] = {
    "messages": [
        ({"messages": [SYSTEM, USER, ANSWER]}, Conversation(messages=(SYSTEM, USER, ANSWER))),
        ({"messages": [USER, ANSWER], "id": 7}, EXCHANGE),
        (
            {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]'},
            EXCHANGE,
        ),
        ({"messages": [USER, ANSWER], "system": "Be kind"}, Conversation(messages=(SYSTEM, USER, ANSWER))),
    ],
    "sharegpt": [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}, EXCHANGE),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello there"}]}, EXCHANGE),
        ({"conversations": [USER, ANSWER], "system": None}, EXCHANGE),
    ],
    "alpaca": [
        ({"instruction": "Hi", "input": "", "output": "Hello there"}, EXCHANGE),
        ({"instruction": "Hi", "input": None, "output": "Hello there"}, EXCHANGE),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Conversation(messages=({"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"})),
        ),
    ],
    "dolly": [
        ({"instruction": "Hi", "context": "", "response": "Hello there", "category": "qa"}, EXCHANGE),
        (
            {"instruction": "Who?", "context": "It was Ada.", "response": "Ada"},
            Conversation(
                messages=({"role": "user", "content": "Who?\n\nIt was Ada."}, {"role": "assistant", "content": "Ada"})
            ),
        ),
    ],
    "prompt_completion": [
        ({"prompt": "Hi", "completion": "Hello there"}, EXCHANGE),
        ({"prompt": [USER], "completion": [ANSWER]}, Conversation(messages=(USER, ANSWER), context=1)),
        ({"prompt": [USER], "completion": "Hello there"}, Conversation(messages=(USER, ANSWER), context=1)),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            Conversation(messages=(USER, ANSWER, USER, ANSWER), context=3),
        ),
    ],
    "oasst_tree": [
        (
            {
                "message_tree_id": "t",
                "prompt": {
                    "role": "prompter",
                    "text": "Hi",
                    "replies": [
                        {"role": "assistant", "text": "Worst", "rank": 1},
                        {"role": "assistant", "text": "Unranked", "rank": None},
                        {
                            "role": "assistant",
                            "text": "Hello there",
                            "rank": 0,
                            "replies": [{"role": "prompter", "text": "A question without an answer"}],
                        },
                        {"role": "assistant", "text": "Gone", "rank": -1, "deleted": True},
                    ],
                },
            },
            EXCHANGE,
        )
    ],
    "glaive": [
        (
            {
                "system": "SYSTEM: Be kind",
                "chat": "USER: Hi\n\n\nASSISTANT: Hello there <|endoftext|>\n\n\n",
            },
            Conversation(messages=(SYSTEM, USER, ANSWER)),
        )
    ],
    "text": [({"text": "  def f():\n    return 1\n\n"}, Conversation(text="  def f():\n    return 1\n\n"))],
    "baseline": [
        ({"messages": [USER, ANSWER, USER]}, Conversation(text="user: Hi\nassistant: Hello there", append_eos=False)),
        ({"messages": [USER | {"content": " Hi "}, ANSWER]}, Conversation(text="user:  Hi ", append_eos=False)),
    ],
}

UNUSABLE: list[tuple[str, dict[str, object], str]] = [
    ("messages", {"messages": []}, "the conversation is empty"),
    ("messages", {"messages": None}, "there are no messages"),
    ("messages", {"messages": [USER]}, "no assistant turn"),
    ("messages", {"messages": [USER | {"role": "robot"}, ANSWER]}, "message 1 has the unknown role 'robot'"),
    ("messages", {"messages": [USER, ANSWER | {"content": 5}]}, "message 2 is a number, not text"),
    ("messages", {"messages": [USER, ANSWER | {"content": None}]}, "message 2 is null, not text"),
    ("messages", {"messages": [USER | {"content": " \n"}, ANSWER]}, "message 1 is empty"),
    ("messages", {"messages": ["Hi"]}, "message 1 is text, not an object with 'role' and 'content'"),
    ("messages", {"messages": [{"role": ["user"], "content": "Hi"}, ANSWER]}, "message 1"),
    ("sharegpt", {"conversations": [{"from": "human", "text": "Hi"}]}, "message 1 needs 'from' and 'value'"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}, "no assistant turn"),
    ("alpaca", {"instruction": "", "output": "x"}, "'instruction' is empty"),
    ("alpaca", {"instruction": "Hi", "output": True}, "'output' is not text but true or false"),
    ("alpaca", {"instruction": "Hi", "input": ["a"], "output": "b"}, "'input' is not text but a list"),
    ("alpaca", {"instruction": "Hi", "input": "a", "context": "b", "output": "c"}, "both 'input' and 'context'"),
    ("alpaca", {"instruction": "Hi", "history": [["a"]], "output": "c"}, "[question, answer] pairs"),
    ("prompt_completion", {"prompt": "Hi", "completion": None}, "'completion' is empty"),
    ("prompt_completion", {"prompt": [USER, ANSWER], "completion": [USER]}, "no assistant turn"),
    ("oasst_tree", {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi"}}, "no assistant turn"),
    ("glaive", {"system": "", "chat": "USER: a\n\nASSISTANT: <functioncall> {}"}, "it calls a function"),
    ("glaive", {"system": "", "chat": "Once upon a time"}, "does not begin with 'USER:'"),
    ("text", {"text": ""}, "'text' is empty"),
    ("text", {"text": "  "}, "'text' is empty"),
    ("baseline", {"messages": [USER]}, "fewer than two messages"),
    ("baseline", {"messages": ["Hi", "Ho"]}, "a message needs 'role' and 'content'"),
    ("baseline", {"messages": [USER | {"content": None}, ANSWER]}, "message 1 has a content that is null, not text"),
    ("messages", {"messages": "[{'role': 'user'}]"}, "It looks like Python's notation"),
    ("messages", {"messages": "Hi"}, "'messages' is text, not a list"),
]


def test_every_format_has_a_reader_an_example_and_a_choice_in_the_recipe() -> None:
    assert set(EXAMPLES) == set(FORMATS) == set(READERS)
    for name in FORMATS:
        assert Data.model_validate({"format": name}).format == name


@pytest.mark.parametrize(
    "readers", [[*FORMATS, "yaml"], list(FORMATS)[1:]], ids=["a reader too many", "a reader too few"]
)
def test_tables_of_formats_and_readers_that_differ_are_refused_at_import(readers: list[str]) -> None:
    [different] = set(readers) ^ set(FORMATS)
    with pytest.raises(RuntimeError, match=f"data formats: {different} must be both in"):
        check_readers(readers)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_reads_its_examples(name: str) -> None:
    for row, conversation in EXAMPLES[name]:
        assert READERS[name](row) == conversation


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.detected])
def test_a_format_is_detected_from_its_columns(name: str) -> None:
    for row, _ in EXAMPLES[name]:
        assert detect_format(row, "f.jsonl:1") == name


@pytest.mark.parametrize(("name", "row", "reason"), UNUSABLE)
def test_an_unusable_row_is_refused_with_the_reason(name: str, row: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        READERS[name](row)


def test_ultrachat_rows_are_messages_though_they_have_a_prompt() -> None:
    assert detect_format({"prompt": "Hi", "prompt_id": "1", "messages": [USER, ANSWER]}, "x") == "messages"


def test_unknown_columns_are_named_with_the_known_shapes() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: no known format has the columns question, answer") as caught:
        detect_format({"question": "Hi", "answer": "Ho"}, "f.jsonl:1")
    assert "prompt_completion: prompt, completion" in str(caught.value)
