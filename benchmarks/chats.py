"""Conversations for the benchmarks, made from a seed out of the built-in sample: as long as is asked for."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowvram_chat.data.sources import open_source

Chat = dict[str, list[dict[str, str]]]

ULTRACHAT = (8.45, 0.55)
"""Mean and deviation of the logarithm of a conversation's characters: a mean of 5,400, about 1,300 GPT-2 tokens, as
ultrachat_200k's are estimated to have."""
TURNS = (2, 4, 4, 6, 6, 6, 8, 8, 10, 12, 14)
QUESTION, ANSWER = 0.35, 1.65
"""Length of a message, as a share of the mean message."""


def sample(split: str = "builtin:chitchat") -> list[Any]:
    """Return the built-in conversations."""
    return [raw for _, raw in open_source(split, split="train", subset=None).rows()]


def like_ultrachat(count: int, seed: int = 7) -> Iterator[Chat]:
    """Yield conversations of ultrachat's lengths, whose messages are sentences of the built-in ones."""
    sentences = [message["content"] for chat in sample() for message in chat["messages"]]
    choose = random.Random(seed)
    for _ in range(count):
        turns = choose.choice(TURNS)
        mean = choose.lognormvariate(*ULTRACHAT) / turns
        yield {"messages": [_message(choose, sentences, number, mean) for number in range(turns)]}


def _message(choose: random.Random, sentences: list[str], number: int, mean: float) -> dict[str, str]:
    role, share = (("user", QUESTION), ("assistant", ANSWER))[number % 2]
    parts, length = [], 0
    while length < mean * share:
        parts.append(choose.choice(sentences))
        length += len(parts[-1]) + 1
    return {"role": role, "content": " ".join(parts) or choose.choice(sentences)}


def write(chats: Iterable[Any], path: Path, limit: int | None = None) -> Path:
    """Write conversations as JSON lines and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for chat in itertools.islice(chats, limit):
            file.write(json.dumps({"messages": chat["messages"]}) + "\n")
    return path
