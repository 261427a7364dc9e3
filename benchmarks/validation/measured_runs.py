"""A CSV file of measured memory peaks, like `vram_measured.csv`: its rows, and the training run that each specifies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.validation.csv_rows import MeasuredRow, choose, count, json_object, number, read_rows, shown, wrong_cell
from benchmarks.validation.stock_run import PLACES_OF_ZERO_GRAD, StockRun, model_config
from lowvram_chat.errors import UsageError
from lowvram_chat.gpus import CONTEXT_MIB

LATE_KERNELS_MIB = 16
"""MiB that kernels loaded during the run take outside the allocator, where the row's note states no figure.

Source: the project's collected facts (14 to 18 MiB).
"""
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

UNSUPPORTED_OPTIMIZERS = frozenset({"Optimizer", "LBFGS", "SparseAdam", "Muon", "ASGD"})
"""Classes of `torch.optim` that are not traced: the base class, one that needs a closure, one for sparse gradients, one for
matrices only, and one that makes scalars on the device in each step, which a trace takes for values on the host."""
MAX_BATCH, MAX_SEQ_LEN, MAX_STEPS = 1_000_000, 1_000_000, 100
"""The largest run that is traced. The peak comes within the first few steps, and every step takes about a second."""
MAX_GPU_MIB = 100_000_000


def read_measured_runs(path: Path) -> list[MeasuredRow]:
    """Return the rows of a file of measured runs.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is not a CSV file with the required columns.
    """
    return read_rows(path, REQUIRED_COLUMNS)


def stock_run(row: MeasuredRow) -> StockRun:
    """Return the run that a row specifies.

    Raises:
        UsageError: a cell is wrong; the message names the row and the column.
    """
    choose(row, "precision", ("fp32",))
    choose(row, "loss", ("logits",))
    choose(row, "metric", ("reserved", "device_delta"))
    choose(row, "out_of_memory", ("yes", "no", ""))
    if not row["gpu"].strip():
        raise wrong_cell(row, "gpu", "it is empty. Name the card that the run was measured on.")
    return StockRun(
        model_type=causal_model_type(row),
        config=checked_config(row),
        batch=count(row, "batch", MAX_BATCH),
        seq_len=count(row, "seq_len", MAX_SEQ_LEN),
        optimizer=_optimizer(row),
        attention=choose(row, "attention", ("eager", "sdpa")),
        mask=choose(row, "mask", ("ones", "none")) == "ones",
        zero_grad=choose(row, "zero_grad", PLACES_OF_ZERO_GRAD),
        steps=count(row, "steps", MAX_STEPS),
    )


def causal_model_type(row: MeasuredRow) -> str:
    """Return a row's model type, one of transformers' causal language models. Raises: UsageError."""
    return choose(
        row, "model_type", (name for name in transformers.CONFIG_MAPPING if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )


def checked_config(row: MeasuredRow) -> dict[str, object]:
    """Return a row's model configuration, once transformers accepts it and the row's sequences fit it.

    Raises:
        UsageError: the configuration is wrong, or `seq_len` exceeds the model's positions.
    """
    settings = json_object(row, "config")
    try:
        config = model_config(row["model_type"], settings)
    except UsageError as error:
        raise wrong_cell(row, "config", str(error)) from None
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and count(row, "seq_len", MAX_SEQ_LEN) > positions:
        raise wrong_cell(row, "seq_len", f"{row['seq_len']} is more than the model's {positions} positions. Lower it.")
    return settings


def limit_mib(row: MeasuredRow) -> float:
    """Return what the allocator can reserve on the row's card, in MiB: all but the context and the kernels loaded late."""
    return count(row, "gpu_total_mib", MAX_GPU_MIB) - CONTEXT_MIB - late_kernels_mib(row)


def measured_mib(row: MeasuredRow) -> float | None:
    """Return the measured peak in MiB; None where the run did not fit."""
    return number(row, "measured_mib") if row["measured_mib"] else None


def late_kernels_mib(row: MeasuredRow) -> float:
    """Return the MiB of kernels loaded late that the row's note states for its card, as in "about +14 MiB on the 4060"."""
    card = row["gpu"].split()[-1]
    stated = re.search(rf"\+(\d{{1,6}})(?: MiB)? on the {re.escape(card)}\b", row["note"])
    return float(stated.group(1)) if stated else LATE_KERNELS_MIB


def _optimizer(row: MeasuredRow) -> str:
    traced = tuple(_optimizers())
    if row["optimizer"] in UNSUPPORTED_OPTIMIZERS:
        raise wrong_cell(
            row,
            "optimizer",
            f"{shown(row['optimizer'])} cannot be traced. Leave the row out, or use {', '.join(traced)}.",
        )
    return choose(row, "optimizer", traced)


def _optimizers() -> Iterator[str]:
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in UNSUPPORTED_OPTIMIZERS:
            yield name
