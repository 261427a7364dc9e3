"""Predicts the speeds in a CSV file of published training speeds, like `speeds_measured.csv`.

A row is predicted if its step can be traced (a stock transformers model or a hand-written GPT-2, AdamW or no optimizer, no
adapter) and the rates of its card are known. The others are listed with the reason. No published speed enters its
prediction.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.validation.csv_rows import MeasuredRow, number, read_rows, table_width, wrong_cell
from benchmarks.validation.speed import predicted_range, predicted_seconds
from benchmarks.validation.speed_rows import REQUIRED_COLUMNS, CannotTrace, Run, published_run
from lowvram_chat.cli import print_json
from lowvram_chat.errors import LowVramError


@dataclass(frozen=True, kw_only=True)
class SpeedPrediction:
    """The published and the predicted speed of one row, in tokens per second."""

    id: str
    gpu: str
    published_tokens_per_second: float
    predicted_tokens_per_second: float | None
    """None where the row cannot be predicted."""
    predicted_range: tuple[float, float] | None
    """The lowest and the highest speed that a plan prints beside it."""
    error_percent: float | None
    """(predicted - published) / published; None where the row cannot be predicted."""
    reason: str | None
    """Why the row cannot be predicted; None where it can."""


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """All rows, and a summary of the absolute errors of the predicted ones; the figures are None where there are none."""

    rows: tuple[SpeedPrediction, ...]
    predicted_rows: int
    rows_in_range: int
    """Rows whose published speed lies in the predicted range."""
    rows_within_20_percent: int
    median_error_percent: float | None
    max_error_percent: float | None


def predict_speed(row: MeasuredRow) -> SpeedPrediction:
    """Return the prediction for one row, or the reason why there is none.

    Raises:
        UsageError: a cell of the row is wrong.
    """
    published = number(row, "measured_tokens_per_second")
    predicted, reason = None, None
    try:
        lowest, predicted, highest = _tokens_per_second(row, published_run(row))
    except CannotTrace as error:
        reason = str(error)
    return SpeedPrediction(
        id=row["id"],
        gpu=row["gpu"],
        published_tokens_per_second=published,
        predicted_tokens_per_second=None if predicted is None else round(predicted, 1),
        predicted_range=None if predicted is None else (round(lowest, 1), round(highest, 1)),
        error_percent=None if predicted is None else round(100 * (predicted / published - 1), 2),
        reason=reason,
    )


def summarise(rows: Sequence[SpeedPrediction]) -> SpeedReport:
    """Return the rows with a summary of their errors."""
    errors = [abs(row.error_percent) for row in rows if row.error_percent is not None]
    return SpeedReport(
        rows=tuple(rows),
        predicted_rows=len(errors),
        rows_in_range=sum(map(is_in_range, rows)),
        rows_within_20_percent=sum(error <= 20 for error in errors),
        median_error_percent=round(statistics.median(errors), 2) if errors else None,
        max_error_percent=max(errors, default=None),
    )


def is_in_range(row: SpeedPrediction) -> bool:
    """Return whether the published speed lies in the predicted range."""
    if row.predicted_range is None:
        return False
    lowest, highest = row.predicted_range
    return lowest <= row.published_tokens_per_second <= highest


def run(path: Path, *, as_json: bool) -> SpeedReport:
    """Predict every row of a file and print the table; with `as_json`, one JSON document is the last line.

    Raises:
        NotFoundError: there is no such file.
        UsageError: the file or one of its rows is wrong. All rows are checked before the first is traced.
    """
    rows = read_rows(path, REQUIRED_COLUMNS)
    for row in rows:
        _check(row)
    report = summarise([predict_speed(row) for row in rows])
    Console(markup=False, emoji=False, highlight=False, width=table_width()).print(table(report))
    for prediction in report.rows:
        if prediction.reason is not None:
            print(f"not predicted: {prediction.id}: {prediction.reason}")
    print(summary(report))
    if as_json:
        print_json(asdict(report))
    return report


def table(report: SpeedReport) -> Table:
    """Return the report as a table for the terminal."""
    columns = Table("run", "card", "published tokens/s", "predicted tokens/s", "range", "error %")
    for row in report.rows:
        columns.add_row(
            row.id,
            row.gpu,
            f"{row.published_tokens_per_second:,.0f}",
            "-" if row.predicted_tokens_per_second is None else f"{row.predicted_tokens_per_second:,.0f}",
            "-" if row.predicted_range is None else " to ".join(f"{speed:,.0f}" for speed in row.predicted_range),
            "-" if row.error_percent is None else f"{row.error_percent:+.1f}",
        )
    return columns


def summary(report: SpeedReport) -> str:
    """Return the summary of the errors in one line."""
    if report.median_error_percent is None:
        return f"none of the {len(report.rows)} rows can be predicted"
    return (
        f"{report.predicted_rows} of {len(report.rows)} rows predicted; absolute error: median "
        f"{report.median_error_percent:.1f} %, largest {report.max_error_percent:.1f} %; {report.rows_within_20_percent} within "
        f"20 %, {report.rows_in_range} in the predicted range"
    )


def _check(row: MeasuredRow) -> None:
    """Check a row's cells without tracing it."""
    number(row, "measured_tokens_per_second")
    try:
        published_run(row)
    except CannotTrace:
        return


def _tokens_per_second(row: MeasuredRow, specified: Run) -> tuple[float, float, float]:
    """Return the lowest, the predicted and the highest speed of a row.

    Raises:
        CannotTrace: the model's code fails, as that of another transformers version may.
        UsageError: transformers cannot build the model.
    """
    try:
        step, rates, compiled = specified
        shortest, longest = predicted_range(step, rates, compiled=compiled)
        return (
            step.tokens / longest,
            step.tokens / predicted_seconds(step, rates, compiled=compiled),
            step.tokens / shortest,
        )
    except LowVramError as error:
        raise wrong_cell(row, "config", str(error)) from None
    except Exception as error:  # whatever the model's code raises
        message = " ".join(str(error).split())[:200]
        version = transformers.__version__
        raise CannotTrace(
            f"its model code fails with transformers {version} ({type(error).__name__}: {message})"
        ) from error
