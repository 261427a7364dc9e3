"""Material that tests make for themselves: a tiny random GPT-2 and conversations, both from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILTIN = ROOT / "lowvram_chat" / "assets" / "tiny-gpt2"

TEXT = "the cat sat on a mat and the dog ran to the red house by the sea where we eat fish at noon"
WORDS = TEXT.split(" ")
POSITIONS = 256


def conversations(number: int, seed: int) -> list[dict[str, Any]]:
    """Return `messages` rows of one to three exchanges whose lengths differ widely: 12 to about 100 tokens."""
    rng = random.Random(seed)

    def sentence() -> str:
        start = rng.randrange(len(WORDS))
        return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(rng.choice((2, 5, 9, 14))))

    rows = []
    for _ in range(number):
        messages = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            messages.append({"role": "user", "content": sentence()})
            messages.append({"role": "assistant", "content": sentence()})
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one row a line and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tiny_gpt2(
    folder: Path,
    *,
    seed: int = 0,
    width: int = 64,
    layers: int = 2,
    positions: int = POSITIONS,
    dropout: float = 0.0,
    unused: int = 0,
) -> Path:
    """Save a random GPT-2 (2 layers x 64) with the built-in tokenizer, as a plain transformers checkpoint; `unused` tokens
    more stand in its vocabulary than the tokenizer makes."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    config = GPT2Config(
        vocab_size=len(tokenizer) + unused,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        n_positions=positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
