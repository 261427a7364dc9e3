"""Predicts the peak memory of training runs that other people measured, and reports the error of the planner.

The file is like `vram_measured.csv`: one run per row, specified well enough to be traced. No measurement enters its
prediction; `measured_mib` is read only to compute the error.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.validation.csv_rows import MeasuredRow, table_width, wrong_cell
from benchmarks.validation.measured_runs import (
    late_kernels_mib,
    limit_mib,
    measured_mib,
    read_measured_runs,
    stock_run,
)
from benchmarks.validation.stock_run import StockRun, trace_stock_run
from lowvram_chat.cli import print_json
from lowvram_chat.errors import LowVramError
from lowvram_chat.planning.replay import Replay, replay
from lowvram_chat.tracing.cuda_rules import CUBLASLT_WORKSPACE_BYTES, CudaRules
from lowvram_chat.units import MIB


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted and the measured peak of one row."""

    id: str
    predicted_mib: float
    """The peak, in the row's own metric."""
    measured_mib: float | None
    """None where the run did not fit its card."""
    error_percent: float | None
    """(predicted - measured) / measured; None where nothing was measured."""
    out_of_memory: bool
    """Whether the run is predicted not to fit its card."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows, and a summary of the absolute errors of the measured ones; the figures are None where there are none."""

    rows: tuple[Prediction, ...]
    median_error_percent: float | None
    within_1_percent: float | None
    """Share of the measured rows with an error of at most 1 %, from 0 to 1."""
    max_error_percent: float | None


def predict_peak(row: MeasuredRow) -> Prediction:
    """Return the prediction for one row; the trace takes seconds.

    Raises:
        UsageError: a cell of the row is wrong.
    """
    result = _replayed(row, stock_run(row))
    predicted = result.peak_reserved_bytes / MIB
    if row["metric"] == "device_delta":
        predicted += late_kernels_mib(row)
    measured = measured_mib(row)
    return Prediction(
        id=row["id"],
        predicted_mib=round(predicted, 1),
        measured_mib=measured,
        error_percent=None if measured is None else round(100 * (predicted - measured) / measured, 3),
        out_of_memory=result.out_of_memory_at is not None,
    )


def summarise(rows: tuple[Prediction, ...]) -> Report:
    """Return the rows with a summary of their errors."""
    errors = [abs(row.error_percent) for row in rows if row.error_percent is not None]
    return Report(
        rows=rows,
        median_error_percent=statistics.median(errors) if errors else None,
        within_1_percent=sum(error <= 1 for error in errors) / len(errors) if errors else None,
        max_error_percent=max(errors, default=None),
    )


def run(path: Path, *, as_json: bool = False) -> Report:
    """Predict every row of a file and print the table; with `as_json`, one JSON document is the last line.

    Raises:
        NotFoundError: there is no such file.
        UsageError: the file or one of its rows is wrong. All rows are checked before the first is traced.
    """
    rows = read_measured_runs(path)
    for row in rows:
        stock_run(row), limit_mib(row), measured_mib(row)
    notes = Console(stderr=True, markup=False, emoji=False)
    for line in version_notes(rows):
        notes.print(line)
    report = summarise(tuple(predict_peak(row) for row in rows))
    Console(markup=False, emoji=False, width=table_width()).print(table(report, rows), summary(report), sep="\n")
    if as_json:
        print_json(asdict(report))
    return report


def version_notes(rows: list[MeasuredRow]) -> Iterator[str]:
    """Yield a sentence about each transformers version other than the installed one whose model code was measured."""
    for version in sorted({row["transformers"] for row in rows} - {"", transformers.__version__}):
        count = sum(row["transformers"] == version for row in rows)
        yield (
            f"{count} of {len(rows)} rows ran transformers {version}; installed is {transformers.__version__}: "
            f"their model code may differ."
        )


def table(report: Report, rows: list[MeasuredRow]) -> Table:
    """Return the report as a table for the terminal; an asterisk marks rows of another transformers version."""
    shown = Table(
        "run",
        "model",
        "B x T",
        "optimizer",
        "predicted MiB",
        "measured MiB",
        "error %",
        "transformers (*: not installed)",
    )
    for row, prediction in zip(rows, report.rows, strict=True):
        is_other_version = row["transformers"] not in ("", transformers.__version__)
        shown.add_row(
            row["id"] + (" (hard)" if row.get("hard") else ""),
            row["model_type"],
            f"{row['batch']} x {row['seq_len']}",
            row["optimizer"],
            "out of memory" if prediction.out_of_memory else f"{prediction.predicted_mib:,.0f}",
            "out of memory" if row["out_of_memory"] == "yes" else _or_dash(prediction.measured_mib, ",.0f"),
            _or_dash(prediction.error_percent, "+.2f"),
            row["transformers"] + ("*" if is_other_version else ""),
        )
    return shown


def summary(report: Report) -> str:
    """Return the summary of the errors in one line."""
    if report.median_error_percent is None or report.within_1_percent is None:
        return "no row has a measurement"
    return (
        f"absolute error: median {report.median_error_percent:.2f} %, largest {report.max_error_percent:.2f} %, "
        f"{report.within_1_percent:.0%} of the rows within 1 %"
    )


def _replayed(row: MeasuredRow, run: StockRun) -> Replay:
    """Return the replay of a row's trace on its card."""
    try:
        return replay(
            trace_stock_run(run, CudaRules(cublaslt_workspace_bytes=CUBLASLT_WORKSPACE_BYTES)),
            limit_bytes=int(limit_mib(row) * MIB),
        )
    except LowVramError as error:
        raise wrong_cell(row, "config", str(error)) from None
    except Exception as error:  # whatever the model's code raises for shapes that do not go together
        message = " ".join(str(error).split())[:200]
        raise wrong_cell(row, "config", f"the run cannot be traced ({type(error).__name__}: {message}).") from error


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
