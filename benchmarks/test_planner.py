"""The error of the planner on runs that other people measured: their memory and their speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import transformers

from benchmarks.suite import ROOT, Keeper
from benchmarks.validation import measured_runs as measured
from benchmarks.validation import memory as validate
from benchmarks.validation import speed as published_speeds
from lowvram_chat.results.record import Metric

MEASURED = ROOT / "benchmarks" / "data" / "vram_measured.csv"
MODEL_CODE = "4.51.3"
"""The transformers version that the measured runs used; `make validate` plans them with it."""
MAX_MEMORY_MEDIAN, MAX_MEMORY_ERROR = 1.0, 11.0
"""The median and the largest error that pass, in per cent, with the transformers version that the runs used."""
MAX_SPEED_MEDIAN, MAX_SPEED_ERROR = 12.0, 25.0
"""The median and the largest error that pass, in per cent."""


def test_predicted_memory_of_published_runs(keeper: Keeper) -> None:
    rows = measured.read_measured_runs(MEASURED)
    errors = {p.id: p.error_percent for p in map(validate.predict_peak, rows) if p.error_percent is not None}
    is_same_code = transformers.__version__ == MODEL_CODE
    problem = _problem(errors, MAX_MEMORY_MEDIAN, MAX_MEMORY_ERROR) if is_same_code else None
    case = "memory" if is_same_code else "memory, model code of today"
    record = keeper.keep("planner", case, _metrics(errors), problem=problem)
    assert record.status == "passed", record.reason


def test_predicted_speed_of_published_runs(keeper: Keeper) -> None:
    errors = {row.published.name: 100 * row.error for row in published_speeds.compare() if not row.published.at_most}
    record = keeper.keep(
        "planner", "speed", _metrics(errors), problem=_problem(errors, MAX_SPEED_MEDIAN, MAX_SPEED_ERROR)
    )
    assert record.status == "passed", record.reason


def _problem(errors: Mapping[str, float], median: float, largest: float) -> str | None:
    """Return why the errors fail, None where they pass; all in per cent."""
    sizes = [abs(error) for error in errors.values()]
    if statistics.median(sizes) <= median and max(sizes) <= largest:
        return None
    return f"median error {statistics.median(sizes):.2f} %, largest {max(sizes):.2f} %; at most {median} and {largest} expected"


def _metrics(errors: Mapping[str, float]) -> dict[str, Metric]:
    sizes = [abs(error) for error in errors.values()]
    rows = {
        f"{name} error": Metric(value=round(error, 3), unit="%", kind="predicted") for name, error in errors.items()
    }
    median = Metric(value=round(statistics.median(sizes), 3), unit="%", kind="predicted", better="lower", tolerance=0.1)
    maximum = Metric(value=round(max(sizes), 3), unit="%", kind="predicted", better="lower", tolerance=0.1)
    return {"median_error": median, "largest_error": maximum, **rows}
