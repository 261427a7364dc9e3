"""Reads metrics.jsonl: the last loss, and the lines that a resumed run writes again."""

from __future__ import annotations

import json
from pathlib import Path

from lowvram_chat.files import write_text
from lowvram_chat.training.checkpoints import step_of
from lowvram_chat.training.run_dir import RunDir


def last_loss(run: RunDir) -> float | None:
    """Return the training loss that was logged last; None if it was not finite."""
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines() if run.metrics_file.is_file() else []
    losses: list[float | None] = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    return losses[-1] if losses else None


def drop_later_lines(run: RunDir, checkpoint: Path) -> None:
    """Drop the lines of steps after the checkpoint, which will be run and logged again."""
    step = step_of(checkpoint)
    if run.metrics_file.is_file():
        lines = run.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(run.metrics_file, "".join(line for line in lines if json.loads(line)["step"] <= step))
