"""Reads raw rows into conversations: one function for each format in `recipe.formats.FORMATS`.

Each function returns a `Conversation`, or raises `ValueError` with the reason why the row cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal

from lowvram_chat.data.conversation import Conversation, Message, conversation_of, exchanges_of, is_empty, is_message
from lowvram_chat.data.known_datasets import read_glaive, read_oasst_tree
from lowvram_chat.data.parsers import parse_json
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS, SYSTEM_COLUMNS
from lowvram_chat.wording import kind_of, shorten

__all__ = [
    "READERS",
    "Conversation",
    "Message",
    "RawFields",
    "check_readers",
    "detect_format",
    "missing_columns",
    "unused_columns",
]

RawFields = Mapping[str, object]
"""A row as it is stored: column -> value."""


def _read_messages(row: RawFields) -> Conversation:
    return conversation_of(_list_in_cell(row, "messages"), system=_system(row))


def _read_sharegpt(row: RawFields) -> Conversation:
    return conversation_of(_list_in_cell(row, "conversations"), column="conversations", system=_system(row))


def _read_alpaca(row: RawFields) -> Conversation:
    if not is_empty(row.get("input")) and not is_empty(row.get("context")):
        raise ValueError("both 'input' and 'context' are given; keep one")
    context = _optional_text(row, "input") or _optional_text(row, "context")
    return _instruction(row, context, "output", _history(row.get("history")))


def _read_dolly(row: RawFields) -> Conversation:
    return _instruction(row, _optional_text(row, "context"), "response", [])


def _instruction(row: RawFields, context: str, answer: str, history: list[tuple[str, str]]) -> Conversation:
    """Return the exchange of an instruction and its answer, after earlier exchanges without loss."""
    question = _required_text(row, "instruction")
    if context:
        question = f"{question.strip()}\n\n{context.strip()}"
    return exchanges_of([*history, (question, _required_text(row, answer))], _system(row), context=len(history))


def _history(value: object) -> list[tuple[str, str]]:
    """Return the earlier (question, answer) pairs of an alpaca row."""
    if is_empty(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"'history' is {kind_of(value)}, not a list of [question, answer] pairs")
    for pair in value:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError("'history' holds something else than [question, answer] pairs of texts")
    return [(pair[0], pair[1]) for pair in value]


def _read_prompt_completion(row: RawFields) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if (parsed := [_messages_in_cell(value) for value in (prompt, completion)]) and None not in parsed:
        prompt, completion = parsed
    if prompt == [] or completion == []:
        raise ValueError(f"'{'prompt' if prompt == [] else 'completion'}' is empty")
    if not isinstance(prompt, list | tuple) and not isinstance(completion, list | tuple):
        return exchanges_of([(_required_text(row, "prompt"), _required_text(row, "completion"))], _system(row))
    if not isinstance(prompt, list | tuple):
        prompt = [{"role": "user", "content": _required_text(row, "prompt")}]
    if not isinstance(completion, list | tuple):
        completion = [{"role": "assistant", "content": _required_text(row, "completion")}]
    conversation_of(completion)  # without an answer of its own, nothing would be learned
    return conversation_of([*prompt, *completion], system=_system(row), context=len(prompt))


def _read_text(row: RawFields) -> Conversation:
    return Conversation(text=_required_text(row, "text"))


def _read_baseline(row: RawFields) -> Conversation:
    """Return the published baseline's text: `role: content` lines, the last message dropped, no EOS token.

    Source: the baseline's public training notebook, as decoded in docs/benchmarks.md.
    """
    messages = _list_in_cell(row, "messages")
    if not isinstance(messages, list | tuple) or len(messages) < 2:
        raise ValueError("fewer than two messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError("a message needs 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise ValueError(f"message {number} has a {key} that is {kind_of(message[key])}, not text")
    return Conversation(
        text="\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1]), append_eos=False
    )


READERS: Mapping[str, Callable[[RawFields], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "dolly": _read_dolly,
    "prompt_completion": _read_prompt_completion,
    "oasst_tree": read_oasst_tree,
    "glaive": read_glaive,
    "text": _read_text,
    "baseline": _read_baseline,
}
"""Format name -> the function that reads its rows."""


def check_readers(readers: Iterable[str]) -> None:
    """Check that every format of a recipe has a reader and that every reader has a format.

    Raises:
        RuntimeError: the two tables differ.
    """
    different = sorted(set(readers) ^ set(FORMATS))
    if different:
        raise RuntimeError(
            f"data formats: {', '.join(different)} must be both in recipe/formats.py (FORMATS) and in data/formats.py "
            "(READERS). Add the missing entry."
        )


check_readers(READERS)


def detect_format(row: RawFields, where: str) -> str:
    """Return the name of the first format whose columns the row has.

    Raises:
        DataError: no format has the row's columns.
    """
    name = _format_of(row)
    if name is not None:
        return name
    known = "; ".join(f"{name}: {', '.join(kind.columns)}" for name, kind in FORMATS.items() if kind.detected)
    raise DataError(
        f"{where}: no known format has the columns {shorten(', '.join(map(str, row))) or '(none)'}. "
        f"Rename them to those of a format ({known}), or set data.format."
    )


def _format_of(row: RawFields) -> str | None:
    detected = [name for name, kind in FORMATS.items() if kind.detected and all(c in row for c in kind.columns)]
    filled = [name for name in detected if all(row[column] is not None for column in FORMATS[name].columns)]
    return next(iter(filled or detected), None)


def missing_columns(row: RawFields, name: str, *, given: bool) -> str:
    """Return what to say of a row without the columns of the format `name`; empty if it has them.

    `given`: the recipe names the format; otherwise it is that of the file's first row.
    """
    missing = [column for column in FORMATS[name].columns if column not in row]
    if not missing:
        return ""
    other = _format_of(row)
    if other is not None and other != name:
        why = f"data.format is {name}" if given else f"the first row of the file has the format {name}"
        return f"this row has the format {other}, but {why}. Put rows of different formats into different files"
    names = " and ".join(f"'{column}'" for column in missing)
    return (
        f"{names} {'is' if len(missing) == 1 else 'are'} missing; the row has {', '.join(map(repr, row)) or 'nothing'}"
    )


def unused_columns(row: RawFields, name: str) -> list[str]:
    """Return the columns of a row that hold something and that its format does not use."""
    used = {*FORMATS[name].columns, *FORMATS[name].optional}
    return [str(column) for column, value in row.items() if column not in used and not is_empty(value)]


def _list_in_cell(row: RawFields, column: str) -> object:
    """Return the list in a column; CSV and Parquet cells may hold it as JSON text."""
    value = row[column]
    if not isinstance(value, str):
        return value
    if is_empty(value):
        return None
    if not value.lstrip().startswith("["):
        raise ValueError(f"'{column}' is text, not a list")
    try:
        return parse_json(value)
    except ValueError as error:
        python = (
            " It looks like Python's notation: write it with json.dumps." if value.lstrip().startswith("[{'") else ""
        )
        raise ValueError(f"'{column}' is text, but {error}.{python}") from None


def _messages_in_cell(value: object) -> object:
    """Return the messages in a cell if its text is a JSON list of messages, else None: answers may be JSON themselves."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return None
    try:
        messages = parse_json(value)
    except ValueError:
        return None
    return messages if isinstance(messages, list) and messages and all(map(is_message, messages)) else None


def _system(row: RawFields) -> str:
    """Return the system message that a row holds in a column of its own; empty if there is none."""
    texts = [text for column in SYSTEM_COLUMNS if (text := _optional_text(row, column))]
    if len(texts) > 1:
        raise ValueError(f"both {' and '.join(map(repr, SYSTEM_COLUMNS))} are given; keep one")
    return texts[0] if texts else ""


def _optional_text(row: RawFields, column: str) -> str:
    """Return the text of a column that may be missing or empty."""
    return "" if is_empty(row.get(column)) else _required_text(row, column)


def _required_text(row: RawFields, column: str) -> str:
    """Return the text of a column that must not be empty; a number is its text, because tables make numbers of "42"."""
    value = row.get(column)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and not is_empty(value):
        return str(value)
    if is_empty(value) and not isinstance(value, list | tuple | dict):
        raise ValueError(f"'{column}' is empty")
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is not text but {kind_of(value)}")
    return value
