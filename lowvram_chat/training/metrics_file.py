"""Reads metrics.jsonl: the last loss, and the lines that a resumed run writes again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lowvram_chat.files import json_text, write_text
from lowvram_chat.training.checkpoints import step_of
from lowvram_chat.training.run_dir import RunDir

log = logging.getLogger(__name__)


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the logged lines. A line that is cut, as by a full disk or a power failure, is left out with a warning."""
    found = []
    lines = (
        run.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()
        if run.metrics_file.is_file()
        else []
    )
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            found.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            log.warning("%s:%d: is damaged, so it is left out", run.metrics_file, number)
    return found


def last_loss(run: RunDir) -> float | None:
    """Return the training loss that was logged last; None if it was not finite."""
    losses: list[float | None] = [entry["loss"] for entry in read_metrics(run) if "loss" in entry]
    return losses[-1] if losses else None


def drop_later_lines(run: RunDir, checkpoint: Path) -> None:
    """Drop the lines of steps after the checkpoint, which will be run and logged again."""
    step = step_of(checkpoint)
    if run.metrics_file.is_file():
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_text(run.metrics_file, "".join(json_text(line) + "\n" for line in kept))
