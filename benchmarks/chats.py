"""Generates conversations for the benchmarks from the built-in ones: a given number of them, by a seed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from lowvram_chat.data.sources import BadRow, open_source

Chat = dict[str, list[dict[str, str]]]

ULTRACHAT = (8.45, 0.55)
"""Mean and standard deviation of the logarithm of a conversation's characters. The mean of 5,400 characters, about 1,300
GPT-2 tokens, is an estimate for ultrachat_200k."""
MESSAGES = (2, 4, 4, 6, 6, 6, 8, 8, 10, 12, 14)
"""Messages in a conversation; each number is as likely as the next."""
QUESTION, ANSWER = 0.35, 1.65
"""Length of a message, as a share of the mean length in its conversation."""


def sample(split: str = "builtin:chitchat") -> list[Chat]:
    """Return the built-in conversations."""
    chats: list[Chat] = []
    for _, row in open_source(split, split="train", subset=None).rows():
        assert not isinstance(row, BadRow)
        messages = row["messages"]
        assert isinstance(messages, list)
        chats.append({"messages": messages})
    return chats


def like_ultrachat(count: int, seed: int = 7) -> Iterator[Chat]:
    """Yield conversations as long as ultrachat's; their messages are made of sentences from the built-in ones."""
    sentences = [message["content"] for chat in sample() for message in chat["messages"]]
    choose = random.Random(seed)
    for _ in range(count):
        messages = choose.choice(MESSAGES)
        mean = choose.lognormvariate(*ULTRACHAT) / messages
        yield {"messages": [_message(choose, sentences, number, mean) for number in range(messages)]}


def _message(choose: random.Random, sentences: list[str], number: int, mean: float) -> dict[str, str]:
    role, share = (("user", QUESTION), ("assistant", ANSWER))[number % 2]
    parts, length = [], 0
    while length < mean * share:
        parts.append(choose.choice(sentences))
        length += len(parts[-1]) + 1
    return {"role": role, "content": " ".join(parts) or choose.choice(sentences)}


def write(chats: Iterable[Chat], path: Path, limit: int | None = None) -> Path:
    """Write at most `limit` conversations as JSON lines and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for chat in itertools.islice(chats, limit):
            file.write(json.dumps({"messages": chat["messages"]}) + "\n")
    return path
