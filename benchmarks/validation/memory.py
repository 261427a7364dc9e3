"""How wrong is the planner? It predicts every run of a file of measured peaks, and says so.

The file is like `vram_measured.csv`: one run a row, specified well enough to be traced. Nothing of a measurement enters
its prediction; `measured_mib` is read only to take the difference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.validation.measured_runs import (
    MeasuredRow,
    late_kernels_mib,
    limit_mib,
    measured_mib,
    read_measured_runs,
    stock_run,
)
from benchmarks.validation.stock_run import trace_stock_run
from lowvram_chat.planning.replay import replay
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.units import MIB


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row: what was predicted and what was measured."""

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
    """All rows and their sums; absolute errors, over the rows that were measured. None where there are none."""

    rows: tuple[Prediction, ...]
    median_error_percent: float | None
    within_1_percent: float | None
    """Share of the measured rows with an error of at most 1 %, from 0 to 1."""
    max_error_percent: float | None


def predict_peak(row: MeasuredRow) -> Prediction:
    """Returns the prediction for one row; it takes a trace, so seconds."""
    result = replay(trace_stock_run(stock_run(row), CudaRules()), limit_bytes=int(limit_mib(row) * MIB))
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
    """Returns the rows with the sums of their errors."""
    errors = [abs(row.error_percent) for row in rows if row.error_percent is not None]
    return Report(
        rows=rows,
        median_error_percent=statistics.median(errors) if errors else None,
        within_1_percent=sum(error <= 1 for error in errors) / len(errors) if errors else None,
        max_error_percent=max(errors, default=None),
    )


def run(path: Path, *, as_json: bool = False) -> Report:
    """Predicts every row of a file and prints the table, or one line of JSON; what `plan --validate` calls."""
    rows = read_measured_runs(path)
    notes = Console(stderr=True)
    for line in version_notes(rows):
        notes.print(line)
    report = summarise(tuple(predict_peak(row) for row in rows))
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        Console().print(table(report, rows), summary(report), sep="\n")
    return report


def version_notes(rows: list[MeasuredRow]) -> Iterator[str]:
    """Says which rows ran another version of the model code than the one installed."""
    for version in sorted({row["transformers"] for row in rows} - {"", transformers.__version__}):
        count = sum(row["transformers"] == version for row in rows)
        yield (
            f"{count} of {len(rows)} rows ran transformers {version}; installed is {transformers.__version__}: "
            f"their model code may differ."
        )


def table(report: Report, rows: list[MeasuredRow]) -> Table:
    """The report for people; an asterisk marks rows of another transformers version."""
    shown = Table("run", "model", "B x T", "optimizer", "predicted MiB", "measured MiB", "error %", "transformers")
    for row, prediction in zip(rows, report.rows, strict=True):
        other = row["transformers"] not in ("", transformers.__version__)
        shown.add_row(
            row["id"] + (" (hard)" if row.get("hard") else ""),
            row["model_type"],
            f"{row['batch']} x {row['seq_len']}",
            row["optimizer"],
            "out of memory" if prediction.out_of_memory else f"{prediction.predicted_mib:,.0f}",
            "out of memory" if row["out_of_memory"] == "yes" else _or_dash(prediction.measured_mib, ",.0f"),
            _or_dash(prediction.error_percent, "+.2f"),
            row["transformers"] + ("*" if other else ""),
        )
    return shown


def summary(report: Report) -> str:
    """The sums in one line."""
    if report.median_error_percent is None or report.within_1_percent is None:
        return "no row has a measurement"
    return (
        f"absolute error: median {report.median_error_percent:.2f} %, largest {report.max_error_percent:.2f} %, "
        f"{report.within_1_percent:.0%} of the rows within 1 %"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
