"""Runs on the tiny model: a recipe in one call, and what a run folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lowvram_chat.api import train as run
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe


class Bench:
    """A folder with a tiny model and conversations, where recipes are made and run."""

    def __init__(self, folder: Path, model: Path, train: Path, held_out: Path) -> None:
        self.folder = folder
        self.model = model
        self.train_file = train
        self.held_out_file = held_out

    def tree(self, name: str, **settings: Any) -> dict[str, Any]:
        """Return a recipe as plain data: full fine-tuning in fp32; `settings` are `section__key=value`."""
        tree: dict[str, Any] = {
            "model": {"name": str(self.model)},
            "adapter": None,
            "data": {"source": str(self.train_file), "eval_source": str(self.held_out_file), "max_length": 64},
            "train": {
                "precision": "fp32",
                "max_steps": 12,
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "save_steps": None,
            },
            "optimizer": {"name": "adamw"},
            "output": {"dir": str(self.folder / name), "sample_prompts": []},  # answers take time
        }
        for key, value in settings.items():
            section, _, field = key.partition("__")
            if field:
                tree[section] = (tree.get(section) or {}) | {field: value}
            else:
                tree[section] = value
        return tree

    def file(self, name: str, **settings: Any) -> Path:
        """Return the path of a recipe file."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.tree(name, **settings)), encoding="utf-8")
        return path

    def recipe(self, name: str, **settings: Any) -> Recipe:
        """Return a loaded recipe."""
        return load_recipe(self.file(name, **settings))

    def run(self, name: str, **settings: Any) -> Path:
        """Train and return the run folder."""
        recipe = self.recipe(name, **settings)
        run(recipe)
        return Path(recipe.output.dir)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run_folder: Path) -> list[float]:
    """Return the logged training losses in order."""
    return [line["loss"] for line in metrics(run_folder) if "loss" in line]


def result(run_folder: Path) -> dict[str, Any]:
    """Return result.json."""
    document: dict[str, Any] = json.loads((run_folder / "result.json").read_text(encoding="utf-8"))
    return document


def differences(one: list[float], other: list[float]) -> tuple[float, float]:
    """Return the largest and the mean absolute difference of two curves of equal length."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(gaps), sum(gaps) / len(gaps)
