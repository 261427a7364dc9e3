"""Reads raw rows into conversations: one function for each format in `recipe.formats.FORMATS`.

Each function returns a `Conversation`, or raises `ValueError` with the reason why the row cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lowvram_chat.errors import DataError
from lowvram_chat.recipe.formats import FORMATS

RawFields = Mapping[str, object]
"""A row as it is stored: column -> value."""
Message = dict[str, str]
"""One message: `role` and `content`."""

KNOWN_ROLES = ("system", "user", "assistant")

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Role in ShareGPT files -> role in chat templates."""


@dataclass(frozen=True)
class Conversation:
    """One training example: messages that a chat template renders, or plain text (then `messages` is empty)."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    append_eos: bool = True
    """Whether an EOS token follows the plain text."""


def _read_messages(row: RawFields) -> Conversation:
    return _checked_conversation(row.get("messages"))


def _read_sharegpt(row: RawFields) -> Conversation:
    return _checked_conversation(row.get("conversations"), "from", "value", SHAREGPT_ROLES)


def _read_alpaca(row: RawFields) -> Conversation:
    question = _required_text(row, "instruction")
    context = row.get("input")
    if isinstance(context, str) and context.strip():
        question += f"\n\n{context.strip()}"
    return _single_exchange(question, _required_text(row, "output"))


def _read_prompt_completion(row: RawFields) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _checked_conversation([*prompt, *completion])
    return _single_exchange(_required_text(row, "prompt"), _required_text(row, "completion"))


def _read_text(row: RawFields) -> Conversation:
    return Conversation(text=_required_text(row, "text"))


def _read_baseline(row: RawFields) -> Conversation:
    """Return the published baseline's text: `role: content` lines, the last message dropped, no EOS token.

    Source: the baseline's public training notebook, as decoded in docs/benchmarks.md.
    """
    messages = row.get("messages")
    if not isinstance(messages, list | tuple) or len(messages) < 2:
        raise ValueError("fewer than two messages")
    try:
        lines = [f"{message['role']}: {message['content']}" for message in messages[:-1]]
    except (TypeError, KeyError):
        raise ValueError("a message needs 'role' and 'content'") from None
    return Conversation(text="\n".join(lines), append_eos=False)


READERS: Mapping[str, Callable[[RawFields], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
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
    detected = {name: kind.columns for name, kind in FORMATS.items() if kind.detected}
    for name, columns in detected.items():
        if all(column in row for column in columns):
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in detected.items())
    raise DataError(
        f"{where}: no known format has the columns {', '.join(map(str, row)) or '(none)'}. "
        f"Rename them to those of a format ({known}), or set data.format."
    )


def _checked_conversation(
    messages: object, role_key: str = "role", text_key: str = "content", roles: Mapping[str, str] | None = None
) -> Conversation:
    """Return the conversation of a list of messages; `roles` maps the file's role names to the known ones."""
    if messages is None:
        raise ValueError("there are no messages")
    if not isinstance(messages, list | tuple):
        raise ValueError(f"the messages are of type {type(messages).__name__}, not a list")
    if not messages:
        raise ValueError("the conversation is empty")
    checked = tuple(
        _checked_message(message, f"message {number}", role_key, text_key, roles or {})
        for number, message in enumerate(messages, start=1)
    )
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError("no assistant turn")
    return Conversation(messages=checked)


def _checked_message(message: object, place: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    """Return one message with its role translated and its content stripped; `place` begins each error."""
    if not isinstance(message, Mapping) or role_key not in message or text_key not in message:
        raise ValueError(f"{place} needs '{role_key}' and '{text_key}'")
    role, content = str(message[role_key]), message[text_key]
    role = roles.get(role, role)
    if role not in KNOWN_ROLES:
        raise ValueError(f"{place} has the unknown role {role!r}; known: {', '.join(KNOWN_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{place} is of type {type(content).__name__}, not text")
    if not content.strip():
        raise ValueError(f"{place} is empty")
    return {"role": role, "content": content.strip()}


def _required_text(row: RawFields, column: str) -> str:
    """Return the stripped text of a column that must not be empty."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"'{column}' is empty")
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is not text")
    if not value.strip():
        raise ValueError(f"'{column}' is empty")
    return value.strip()


def _single_exchange(question: str, answer: str) -> Conversation:
    return Conversation(messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
