"""The data formats that a recipe can name.

This table states what users need to know about each format. `data/formats.py` maps each name to the function that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that hold a system message beside the conversation."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write conversations down as rows of a table."""

    description: str
    """What a row holds, on one line."""
    columns: tuple[str, ...]
    """The columns that a row must have."""
    optional: tuple[str, ...] = ()
    """Further columns that are used where a row has them."""
    has_roles: bool = True
    """Whether a row tells the assistant's words from the rest; False requires `data.loss_on=all`."""
    detected: bool = True
    """Whether the format is recognised by its columns; False: it is only used where `data.format` names it."""


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        description="A list of messages with `role` and `content`",
        columns=("messages",),
        optional=SYSTEM_COLUMNS,
    ),
    "sharegpt": Format(
        description="A list of messages with `from` (human, gpt, ...) and `value`",
        columns=("conversations",),
        optional=SYSTEM_COLUMNS,
    ),
    "alpaca": Format(
        description="An instruction, an optional input and the output; optionally a system message and earlier turns",
        columns=("instruction", "output"),
        optional=("input", "context", "history", *SYSTEM_COLUMNS),
    ),
    "dolly": Format(
        description="Dolly's columns: an instruction, its context (may be empty) and the response",
        columns=("instruction", "context", "response"),
        optional=SYSTEM_COLUMNS,
    ),
    "prompt_completion": Format(
        description="A prompt and its completion, each a text or a list of messages",
        columns=("prompt", "completion"),
        optional=SYSTEM_COLUMNS,
    ),
    "oasst_tree": Format(
        description="A message tree of OpenAssistant, of which the best-ranked path is used",
        columns=("message_tree_id", "prompt"),
    ),
    "glaive": Format(
        description="Glaive's `system` and `chat` texts, in rows without function calls",
        columns=("system", "chat"),
    ),
    "text": Format(
        description="Plain text without roles, followed by an EOS token",
        columns=("text",),
        has_roles=False,
    ),
    "baseline": Format(
        description="The published baseline's text: `role: content` lines without the last message, no EOS token",
        columns=("messages",),
        has_roles=False,
        detected=False,
    ),
}
"""Format name -> its properties. Detection takes the first format whose columns a row has, in this order."""
