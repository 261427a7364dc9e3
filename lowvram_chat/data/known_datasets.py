"""Reads the rows of well-known datasets with a shape of their own, and refuses preference data with what to do.

Sources: the dataset cards of OpenAssistant/oasst2 ("ready" message trees), glaiveai/glaive-function-calling-v2, and TRL's
"Dataset formats and types" for preference and unpaired preference data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lowvram_chat.data.conversation import Conversation, conversation_of, is_empty
from lowvram_chat.errors import DataError
from lowvram_chat.wording import kind_of

RawFields = Mapping[str, object]

OASST_ROLES = {"prompter": "user", "assistant": "assistant"}

LABEL_COLUMNS = ("label", "kto_tag")
"""Columns that tell good answers from bad ones in unpaired preference data (KTO)."""
BAD_LABELS = ("false", "0", "0.0", "-1", "-1.0", "bad", "f", "n", "no", "negative", "rejected", "undesirable")
"""Labels of bad answers, as texts in lower case."""
PAIRED_COLUMNS = ("chosen", "rejected")
"""Columns of paired preference data (DPO)."""
OASST_MESSAGE_COLUMNS = ("message_id", "parent_id", "role", "text")
"""Columns of OpenAssistant's flat files, whose rows are single messages."""


def read_oasst_tree(row: RawFields) -> Conversation:
    """Return the best path of a message tree: at each message the reply with the best rank, up to the last answer."""
    messages: list[dict[str, object]] = []
    node: object = row["prompt"]
    while node is not None:
        if not isinstance(node, Mapping) or not {"role", "text"} <= node.keys():
            raise ValueError(f"'prompt' or a reply is {kind_of(node)} without 'role' and 'text'")
        messages.append({"role": OASST_ROLES.get(str(node["role"]), node["role"]), "content": node["text"]})
        replies = node.get("replies") or []
        if not isinstance(replies, list | tuple):
            raise ValueError(f"'replies' is {kind_of(replies)}, not a list")
        node = min((reply for reply in replies if not _is_deleted(reply)), key=_rank, default=None)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant turn")
    return conversation_of(messages)


def _is_deleted(reply: object) -> bool:
    return isinstance(reply, Mapping) and reply.get("deleted") is True


def _rank(reply: object) -> float:
    """Return the rank of a reply, 0 for the best; one without a rank comes after all others."""
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    try:
        return float(rank) if isinstance(rank, int | float | str) else math.inf
    except ValueError:
        return math.inf


GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
GLAIVE_END = "<|endoftext|>"


def read_glaive(row: RawFields) -> Conversation:
    """Return the conversation of a Glaive row.

    Raises:
        ValueError: it calls a function, or is not of this shape.
    """
    system, chat = row["system"], row["chat"]
    if not isinstance(chat, str) or not isinstance(system, str):
        raise ValueError(f"'system' is {kind_of(system)} and 'chat' is {kind_of(chat)}; both must be text")
    if "<functioncall>" in chat or "FUNCTION RESPONSE:" in chat:
        raise ValueError("it calls a function, which is not supported")
    before, *pieces = GLAIVE_TURN.split(chat)
    if before.strip() or not pieces:
        raise ValueError("'chat' does not begin with 'USER:' or 'ASSISTANT:'")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    messages = [
        {"role": role.lower(), "content": text.strip().removesuffix(GLAIVE_END).strip()} for role, text in turns
    ]
    return conversation_of(messages, system=system.strip().removeprefix("SYSTEM:").strip())


def refuse_bad_labels(row: RawFields, where: str) -> None:
    """Refuse a row that is labelled as a bad answer.

    Raises:
        DataError: with how to keep the good ones.
    """
    label = next((column for column in LABEL_COLUMNS if row.get(column) is not None), None)
    if label is not None and str(row[label]).strip().lower() in BAD_LABELS:
        raise DataError(
            f"{where}: '{label}' is {row[label]}, so this is preference data (KTO), and training on it would teach the bad "
            f"answers too. Keep only the rows whose '{label}' is true, in a file of their own. If '{label}' means something "
            "else, rename the column."
        )


def refuse_pairs(row: RawFields, where: str) -> None:
    """Refuse a row that is no example to imitate: a pair of a good and a bad answer, or one message of a tree.

    Raises:
        DataError: with how to get conversations out of such data.
    """
    if all(not is_empty(row.get(column)) for column in PAIRED_COLUMNS) and not _ends_with_answer(row.get("messages")):
        raise DataError(
            f"{where}: 'chosen' and 'rejected' are preference data (DPO), and this is supervised fine-tuning. Write the good "
            "answers to a file: 'chosen' as 'messages' if it is a list of messages, or as 'completion' beside 'prompt'."
        )
    if all(column in row for column in OASST_MESSAGE_COLUMNS):
        raise DataError(
            f"{where}: each row is one message of a tree (OpenAssistant's flat files), not a conversation. Use the file of "
            "whole trees (*_ready.trees.jsonl.gz), whose best path is used."
        )


def _ends_with_answer(messages: object) -> bool:
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"
