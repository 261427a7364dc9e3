"""Row formats: one row of the table = one way in which people write conversations down.

Each reader turns a raw row into a `Conversation`, or raises `ValueError` with the reason why the row cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowvram_chat.errors import DataError

KNOWN_ROLES = ("system", "user", "assistant")
RawFields = Mapping[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What is trained on: messages that a chat template renders, or plain text (`messages` empty)."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    ends: bool = True
    """Whether an EOS follows the plain text."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format: the columns it is recognised by and its reader."""

    columns: tuple[str, ...]
    read: Callable[[RawFields], Conversation]
    has_roles: bool = True
    """Whether the format tells the assistant's words from the rest."""


def _chat(messages: Any, role_key: str, text_key: str, names: Mapping[str, str]) -> Conversation:
    """Return a checked conversation from a list of role/text mappings."""
    if messages is None:
        raise ValueError("there are no messages")
    if not isinstance(messages, list | tuple):
        raise ValueError(f"the messages are no list but {type(messages).__name__}")
    if not messages:
        raise ValueError("the conversation is empty")
    checked: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or role_key not in message or text_key not in message:
            raise ValueError(f"message {number} has no '{role_key}' and '{text_key}'")
        role, content = str(message[role_key]), message[text_key]
        role = names.get(role, role)
        if role not in KNOWN_ROLES:
            raise ValueError(f"message {number} has the unknown role {role!r}; known: {', '.join(KNOWN_ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} is not text but {type(content).__name__}")
        if not content.strip():
            raise ValueError(f"message {number} is empty")
        checked.append({"role": role, "content": content.strip()})
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError("no assistant turn")
    return Conversation(messages=tuple(checked))


def _words(row: RawFields, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        empty = value is None or isinstance(value, str)
        raise ValueError(f"'{column}' is {'empty' if empty else 'not text'}")
    return value.strip()


def _messages(row: RawFields) -> Conversation:
    return _chat(row.get("messages"), "role", "content", {})


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def _sharegpt(row: RawFields) -> Conversation:
    return _chat(row.get("conversations"), "from", "value", SHAREGPT_ROLES)


def _alpaca(row: RawFields) -> Conversation:
    context = row.get("input")
    question = _words(row, "instruction") + (
        f"\n\n{context.strip()}" if isinstance(context, str) and context.strip() else ""
    )
    return _exchange(question, _words(row, "output"))


def _prompt_completion(row: RawFields) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion], "role", "content", {})
    return _exchange(_words(row, "prompt"), _words(row, "completion"))


def _exchange(question: str, answer: str) -> Conversation:
    return Conversation(messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _text(row: RawFields) -> Conversation:
    return Conversation(text=_words(row, "text"))


def _baseline(row: RawFields) -> Conversation:
    """Return the published baseline's text: `role: content` lines, the last message dropped, no EOS.

    Source: the baseline's public training notebook, as decoded in the README.
    """
    messages = row.get("messages")
    if not isinstance(messages, list | tuple) or len(messages) < 2:
        raise ValueError("fewer than two messages")
    try:
        return Conversation(text="\n".join(f"{m['role']}: {m['content']}" for m in messages[:-1]), ends=False)
    except (TypeError, KeyError):
        raise ValueError("a message has no 'role' and 'content'") from None


FORMATS: Mapping[str, Format] = {
    "messages": Format(columns=("messages",), read=_messages),
    "sharegpt": Format(columns=("conversations",), read=_sharegpt),
    "alpaca": Format(columns=("instruction", "output"), read=_alpaca),
    "prompt_completion": Format(columns=("prompt", "completion"), read=_prompt_completion),
    "text": Format(columns=("text",), read=_text, has_roles=False),
    "baseline": Format(columns=("messages",), read=_baseline, has_roles=False),
}


def detect_format(row: RawFields, where: str) -> str:
    """Return the name of the first format whose columns the row has.

    Raises:
        DataError: no format fits.
    """
    for name, kind in FORMATS.items():
        if all(column in row for column in kind.columns):
            return name
    shapes = "; ".join(f"{name}: {', '.join(kind.columns)}" for name, kind in FORMATS.items() if name != "baseline")
    raise DataError(
        f"{where}: no known format has the columns {', '.join(map(str, row)) or '(none)'}. "
        f"Rename them to one of these ({shapes}), or name data.format."
    )
