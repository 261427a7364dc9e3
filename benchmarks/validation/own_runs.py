"""The runs whose steps are predicted and measured on this machine's processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowvram_chat.recipe.schema import Recipe

TINY: dict[str, Any] = {"model": {"name": "builtin:tiny-gpt2"}, "train": {"per_device_train_batch_size": 16}}
CASES: Mapping[str, dict[str, Any]] = {
    "tiny, full": TINY,
    "tiny, LoRA": TINY | {"adapter": {}},
    "GPT-2 small, full": {},
    "GPT-2 small, LoRA": {"adapter": {}},
    "GPT-2 small, packed": {"data": {"rows": "packed", "max_length": 512}, "train": {"per_device_train_batch_size": 1}},
    "GPT-2 small, checkpointed": {"train": {"gradient_checkpointing": True}},
    "GPT-2 small, 8-bit AdamW": {"optimizer": {"name": "adamw_8bit"}},
}
"""Name of a run -> what it changes in `BASE`."""
BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "openai-community/gpt2", "dropout": 0.0},
    "data": {"source": "unused.jsonl", "max_length": 256},
    "train": {
        "precision": "fp32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "compile": False,
        "dataloader_num_workers": 0,
    },
    "optimizer": {"name": "adamw"},
}


def recipe_of(case: str) -> Recipe:
    """Return the recipe of a case."""
    changes = CASES[case]
    sections = {name: section | changes.get(name, {}) for name, section in BASE.items()}
    return Recipe.model_validate(changes | sections)
