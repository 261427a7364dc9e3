"""A conversation as it is read from a row, and the checks of its messages."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lowvram_chat.wording import kind_of

Message = dict[str, str]
"""One message: `role` and `content`."""

HANGUL_FILLER = "\u3164"
KNOWN_ROLES = ("system", "user", "assistant")

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Role in ShareGPT files -> role in chat templates."""

MESSAGE_KEYS = {"content": "role", "value": "from"}
"""Key of a message's text -> key of its role."""
WEIGHT_KEYS = ("weight", "train", "training", "loss", "trainable")
"""Keys of a message that say whether it carries loss: 1 or true, 0 or false."""
CALL_KEYS = ("tool_calls", "function_call")
"""Keys of a message that calls a tool."""


@dataclass(frozen=True)
class Conversation:
    """One training example: messages that a chat template renders, or plain text (then `messages` is empty)."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    append_eos: bool = True
    """Whether an EOS token follows the plain text."""
    context: int = 0
    """Number of leading messages that are context only: they carry loss under `data.loss_on=all` alone."""
    untrained: frozenset[int] = frozenset()
    """Numbers, from 0, of the messages that never carry loss, because the row gives them the weight 0."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Message keys with content that is not used, such as `messages.reasoning_content`; each once."""


@dataclass(frozen=True)
class _Message:
    """A checked message."""

    role: str
    content: str
    carries_loss: bool
    unused: tuple[str, ...]


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: only white space, control characters and characters without a width."""
    return not text.strip() or all(
        character.isspace() or character == HANGUL_FILLER or unicodedata.category(character) in ("Cc", "Cf")
        for character in text
    )


def is_empty(value: object) -> bool:
    """Return whether a value says nothing: null, NaN, an empty or blank text, an empty list or object."""
    if isinstance(value, str):
        return is_blank(value)
    return value is None or value in ([], {}, ()) or (isinstance(value, float) and math.isnan(value))


def is_message(value: object) -> bool:
    """Return whether a value is an object with the keys of a message."""
    return isinstance(value, Mapping) and any({text, role} <= value.keys() for text, role in MESSAGE_KEYS.items())


def conversation_of(
    messages: object, *, column: str = "messages", system: str = "", context: int = 0, needs_answer: bool = True
) -> Conversation:
    """Return the conversation of a list of messages, after an optional system message.

    `context` is the number of the leading messages that carry no loss, without the system message.

    Raises:
        ValueError: the messages cannot be used; with the reason.
    """
    numbered = list(enumerate(_checked_messages(messages)))
    kept = [(number < context, message) for number, message in numbered if not _is_empty_system(message)]
    has_system = bool(kept) and kept[0][1].role == "system"
    if system and has_system and kept[0][1].content.strip() != system.strip():
        raise ValueError("there are two system messages, one of them in a column of its own")
    if system and not has_system:
        kept.insert(0, (context > 0, _Message("system", system, carries_loss=True, unused=())))
    if needs_answer and all(message.role != "assistant" for _, message in kept):
        raise ValueError("no assistant turn")
    return Conversation(
        messages=tuple({"role": message.role, "content": message.content} for _, message in kept),
        context=sum(is_context for is_context, _ in kept),
        untrained=frozenset(number for number, (_, message) in enumerate(kept) if not message.carries_loss),
        unused=tuple(dict.fromkeys(f"{column}.{key}" for _, message in kept for key in message.unused)),
    )


def _checked_messages(messages: object) -> Iterator[_Message]:
    if messages is None:
        raise ValueError("there are no messages")
    if not isinstance(messages, list | tuple):
        raise ValueError(f"the messages are {kind_of(messages)}, not a list")
    if not messages:
        raise ValueError("the conversation is empty")
    for number, message in enumerate(messages, start=1):
        yield _checked_message(message, f"message {number}")


def _is_empty_system(message: _Message) -> bool:
    return message.role == "system" and is_blank(message.content)


def _checked_message(message: object, place: str) -> _Message:
    """Return one message; `place` begins each error."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {kind_of(message)}, not an object with 'role' and 'content'")
    text_key = "value" if message.get("from") is not None and message.get("role") is None else "content"
    role_key = MESSAGE_KEYS[text_key]
    if role_key not in message or text_key not in message:
        has_keys = f"; it has {', '.join(map(repr, message))}" if message else ""
        raise ValueError(f"{place} needs '{role_key}' and '{text_key}'{has_keys}")
    _refuse_calls(message, place)
    role = SHAREGPT_ROLES.get(str(message[role_key]), str(message[role_key]))
    if role not in KNOWN_ROLES:
        raise ValueError(f"{place} has the unknown role {role!r}; known: {', '.join(KNOWN_ROLES)}")
    used = {role_key, text_key, *WEIGHT_KEYS, *CALL_KEYS} - {
        key for key in ("loss",) if not _is_switch(message.get(key))
    }
    unused = tuple(str(key) for key, value in message.items() if key not in used and not is_empty(value))
    unused += tuple(f"{text_key}.{key}" for key in _keys_of_parts(message[text_key]))
    content = _content(message[text_key], place, may_be_empty=role == "system")
    return _Message(role, content, _carries_loss(message, place), unused)


def _refuse_calls(message: Mapping[str, object], place: str) -> None:
    for key in CALL_KEYS:
        if not is_empty(message.get(key)):
            raise ValueError(f"{place} calls a tool ('{key}'), which is not supported")


def _content(value: object, place: str, *, may_be_empty: bool) -> str:
    """Return the text of a message, which may be given as a list of text parts."""
    if may_be_empty and is_empty(value):
        return ""
    if isinstance(value, list | tuple):
        value = "".join(_part_text(part, place) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{place} is {kind_of(value)}, not text")
    if is_blank(value) and not may_be_empty:
        raise ValueError(f"{place} is empty")
    return value


def _part_text(part: object, place: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} has a part that is {kind_of(part)}, not an object of the type text")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{place} has a part of the type {part.get('type')!r}; only text is supported")
    return str(part["text"])


def _keys_of_parts(value: object) -> list[str]:
    """Return the further keys of a content's parts that hold something."""
    parts = value if isinstance(value, list | tuple) else ()
    keys = (str(key) for part in parts if isinstance(part, Mapping) for key, held in part.items() if not is_empty(held))
    return [key for key in dict.fromkeys(keys) if key not in ("type", "text")]


def _is_switch(value: object) -> bool:
    return value is None or value in (0, 1)  # True and False, too


def _carries_loss(message: Mapping[str, object], place: str) -> bool:
    """Return whether a message's weight allows loss on it; no weight allows it."""
    given = [(key, message[key]) for key in WEIGHT_KEYS if message.get(key) is not None]
    given = [(key, value) for key, value in given if key != "loss" or _is_switch(value)]  # others are measured losses
    for key, value in given:
        if not _is_switch(value):
            raise ValueError(f"{place} has '{key}': {value!r}; only 0, 1, false and true are supported")
    return all(value for _, value in given)


def exchanges_of(turns: Sequence[tuple[str, str]], system: str, context: int = 0) -> Conversation:
    """Return the conversation of (question, answer) pairs; the first `context` pairs carry no loss."""
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return conversation_of(messages, system=system, context=2 * context)
