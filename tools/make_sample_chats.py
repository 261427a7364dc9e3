"""Make the sample conversations of the package from the MIT-licensed PyPI package `chitchat-dataset`.

    pip install --no-deps chitchat-dataset==0.9.0 better-profanity==0.7.0
    python tools/make_sample_chats.py --out lowvram_chat/assets/chitchat

It keeps the first 16 turns of conversations that have at least 4 turns, are in plain English, and contain no links, addresses,
numbers of five or more digits, or profanity. The first speaker becomes the user and the second the assistant. Consecutive
messages of one speaker are joined.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from importlib import metadata
from pathlib import Path

import better_profanity
import chitchat_dataset

MIN_TURNS, MAX_TURNS = 4, 16
CHARACTERS = range(2, 401)
HELD_OUT = 200
BUDGET_BYTES = 2_900_000
UNWANTED = re.compile(r"https?:|www\.|@|\d{5,}|[^\x20-\x7e]")
PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
ENGLISH = {
    "the",
    "a",
    "i",
    "you",
    "to",
    "is",
    "it",
    "and",
    "of",
    "in",
    "that",
    "do",
    "what",
    "my",
    "im",
    "i'm",
    "for",
    "have",
}


def messages(conversation: dict[str, object]) -> list[dict[str, str]]:
    """Return a conversation as alternating messages of user and assistant, the last one by the assistant."""
    turns = [" ".join(part["text"] for part in turn) for turn in conversation["messages"]]  # type: ignore[attr-defined]
    turns = [re.sub(r"\s+", " ", turn).strip() for turn in turns]
    turns = [turn.translate(PLAIN) for turn in turns[: min(MAX_TURNS, len(turns) // 2 * 2)]]
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def is_suitable(chat: list[dict[str, str]], profanity: re.Pattern[str]) -> bool:
    """Return whether a conversation is long, varied and clean enough for the sample."""
    texts = [message["content"] for message in chat]
    words = [word for text in texts for word in text.lower().split()]
    return (
        len(texts) >= MIN_TURNS
        and all(len(text) in CHARACTERS and not UNWANTED.search(text) for text in texts)
        and len(set(texts)) == len(texts)
        and len(words) >= 4 * len(texts)
        and sum(word in ENGLISH for word in words) >= 0.12 * len(words)
        and not profanity.search("\n".join(texts).lower())
    )


def profanity_pattern() -> re.Pattern[str]:
    """Return a pattern that matches the words and phrases in better-profanity's list."""
    path = Path(better_profanity.__file__).parent / "profanity_wordlist.txt"
    words = [re.escape(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return re.compile(rf"\b({'|'.join(words)})\b")


def main() -> None:
    """Filter the conversations, shuffle them with a fixed seed, split them and write both files."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    out: Path = arguments.parse_args().out
    profanity = profanity_pattern()
    chats = [chat for chat in map(messages, chitchat_dataset.Dataset().values()) if is_suitable(chat, profanity)]
    random.Random(0).shuffle(chats)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    while sum(map(len, lines)) > BUDGET_BYTES:
        lines.pop()
    out.mkdir(parents=True, exist_ok=True)
    (out / "held_out.jsonl").write_text("".join(lines[:HELD_OUT]), encoding="utf-8")
    (out / "train.jsonl").write_text("".join(lines[HELD_OUT:]), encoding="utf-8")
    licence = next(file for file in metadata.files("chitchat-dataset") or [] if file.name == "LICENSE")
    shutil.copyfile(str(licence.locate()), out / "LICENSE")
    print(f"{len(lines) - HELD_OUT} conversations, {HELD_OUT} held out, {sum(map(len, lines)):,} bytes")


if __name__ == "__main__":
    main()
