"""A file of measured runs, like `vram_measured.csv`: its rows, checked, and the training run that each specifies."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.validation.stock_run import PLACES_OF_ZERO_GRAD, StockRun
from lowvram_chat.errors import NotFoundError, UsageError, did_you_mean
from lowvram_chat.gpus import CONTEXT_MIB

LATE_KERNELS_MIB = 16
"""Kernels loaded during a run, outside the allocator, where a row's note does not say (project facts: 14 to 18 MiB)."""
REQUIRED_COLUMNS = (
    "id",
    "model_type",
    "config",
    "batch",
    "seq_len",
    "precision",
    "optimizer",
    "attention",
    "loss",
    "mask",
    "zero_grad",
    "steps",
    "transformers",
    "gpu",
    "gpu_total_mib",
    "metric",
    "measured_mib",
    "out_of_memory",
    "note",
)
"""What a file must have; it may have more."""

UNSUPPORTED_OPTIMIZERS = frozenset({"Optimizer", "LBFGS", "SparseAdam", "Muon"})
"""Of `torch.optim`: the base, one that wants a closure, one for sparse gradients, one for matrices only."""

MeasuredRow = Mapping[str, str]


def read_measured_runs(path: Path) -> list[MeasuredRow]:
    """Returns the rows of a file of measured runs.

    Raises: NotFoundError, UsageError where the file is missing or lacks a column.
    """
    if not path.is_file():
        raise NotFoundError(f"--validate: no file {path}. Name a CSV like vram_measured.csv.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        present = reader.fieldnames or []
        missing = [name for name in REQUIRED_COLUMNS if name not in present]
        if missing:
            raise UsageError(f"{path}: columns missing: {', '.join(missing)}. Add them, as in vram_measured.csv.")
        return list(reader)


def stock_run(row: MeasuredRow) -> StockRun:
    """Returns the run that a row specifies. Raises: UsageError, which names the row and the column."""
    _choose(row, "precision", ("fp32",))
    _choose(row, "loss", ("logits",))
    _choose(row, "metric", ("reserved", "device_delta"))
    return StockRun(
        model_type=_choose(row, "model_type", tuple(transformers.CONFIG_MAPPING.keys())),
        config=_config(row),
        batch=_count(row, "batch"),
        seq_len=_count(row, "seq_len"),
        optimizer=_choose(row, "optimizer", tuple(_optimizers())),
        attention=_choose(row, "attention", ("eager", "sdpa")),
        mask=_choose(row, "mask", ("ones", "none")) == "ones",
        zero_grad=_choose(row, "zero_grad", PLACES_OF_ZERO_GRAD),
        steps=_count(row, "steps"),
    )


def limit_mib(row: MeasuredRow) -> float:
    """What the allocator could take of the row's card, MiB: all but the context and the kernels loaded late."""
    return _count(row, "gpu_total_mib") - CONTEXT_MIB - late_kernels_mib(row)


def measured_mib(row: MeasuredRow) -> float | None:
    """The measured peak, MiB; None where the run did not fit."""
    return _number(row, "measured_mib") if row["measured_mib"] else None


def late_kernels_mib(row: MeasuredRow) -> float:
    """What the row's note says of kernels loaded late on its card, as in "about +14 MiB on the 4060"."""
    model = row["gpu"].split()[-1] if row["gpu"] else ""
    said = re.search(rf"\+(\d+)(?: MiB)? on the {re.escape(model)}\b", row["note"]) if model else None
    return float(said.group(1)) if said else LATE_KERNELS_MIB


def _optimizers() -> Iterator[str]:
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in UNSUPPORTED_OPTIMIZERS:
            yield name


def _choose(row: MeasuredRow, column: str, choices: tuple[str, ...]) -> str:
    value = row[column]
    if value in choices:
        return value
    known = f" Known: {', '.join(choices)}." if len(choices) < 9 else did_you_mean(value, choices)
    raise UsageError(f"row {row['id']}, column {column}: {value!r} is not known.{known}")


def _number(row: MeasuredRow, column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise UsageError(f"row {row['id']}, column {column}: {row[column]!r} is not a number.") from None


def _count(row: MeasuredRow, column: str) -> int:
    value = _number(row, column)
    if value < 1 or value != int(value):
        raise UsageError(f"row {row['id']}, column {column}: {row[column]!r} is not a whole number above 0.")
    return int(value)


def _config(row: MeasuredRow) -> dict[str, Any]:
    try:
        config = json.loads(row["config"])
    except json.JSONDecodeError as error:
        raise UsageError(f"row {row['id']}, column config: not JSON ({error}). Correct it.") from None
    if not isinstance(config, dict):
        raise UsageError(f"row {row['id']}, column config: {row['config']!r} is not a JSON object. Correct it.")
    return config
