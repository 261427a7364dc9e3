"""Compares the time model with training speeds that other people published: every row, its error, and how it was read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from benchmarks.validation.plain_step import PlainStep, trace_plain_step
from benchmarks.validation.published_runs import PUBLISHED, Published
from lowvram_chat.cli import print_json
from lowvram_chat.gpus import GPUS
from lowvram_chat.timing import fusion
from lowvram_chat.timing.roofline import Rates, range_of_seconds, seconds_per_step
from lowvram_chat.timing.speed import card_rates
from lowvram_chat.tracing.operations import Operation

TF32_TFLOPS = {"a100-40gb": 156.0, "rtx-3090-24gb": 35.6}
"""Peak rates of fp32 matrix products as TF32. Source: NVIDIA's A100 data sheet and GA102 whitepaper."""


class ComparisonDocument(TypedDict):
    """A comparison as JSON."""

    name: str
    gpu: str
    published_ms: float
    published_ms_at_most: float | None
    predicted_ms: float
    error_percent: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published time and the predicted one."""

    published: Published
    predicted_ms: float

    @property
    def error(self) -> float:
        """(predicted - published) / published; 0 inside a published range, measured from its nearer end outside."""
        low = self.published.milliseconds
        nearest = min(max(self.predicted_ms, low), self.published.at_most or low)
        return (self.predicted_ms - nearest) / nearest


def compare(rows: Sequence[Published] = PUBLISHED) -> list[Comparison]:
    """Return each row with its prediction; the traces take about 20 seconds, once per process."""
    return [Comparison(published=row, predicted_ms=1000 * _seconds(row)) for row in rows]


def median_error(comparisons: Sequence[Comparison]) -> float:
    """Return the median of the absolute errors, over the rows that publish a figure and not a range."""
    return statistics.median(abs(row.error) for row in comparisons if row.published.at_most is None)


def largest_error(comparisons: Sequence[Comparison]) -> float:
    """Return the largest absolute error of all rows."""
    return max(abs(row.error) for row in comparisons)


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return the comparison as a table for the terminal."""
    shown = Table("run", "card", "published ms", "predicted ms", "error")
    for row in comparisons:
        published = row.published
        figures = [published.milliseconds, *([published.at_most] if published.at_most else [])]
        shown.add_row(
            published.name,
            GPUS[published.gpu].title,
            " to ".join(f"{figure:.4g}" for figure in figures),
            f"{row.predicted_ms:.1f}",
            f"{row.error:+.1%}",
        )
    return shown


def run(*, as_json: bool) -> None:
    """Print the comparison; with `as_json`, one JSON document is the last line."""
    comparisons = compare()
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(comparisons))
    print(
        f"median error {median_error(comparisons):.1%} of the {sum(c.published.at_most is None for c in comparisons)} rows "
        f"with a figure, largest {largest_error(comparisons):.1%}; the constants were chosen with these rows in sight"
    )
    for name, reading in {c.published.name: c.published.reading for c in comparisons if c.published.reading}.items():
        print(f"{name}: {reading}")
    if as_json:
        print_json({"rows": [_document(row) for row in comparisons]})


def predicted_seconds(
    step: PlainStep, rates: Rates, *, compiled: bool, pads: bool = True, system: str = "linux"
) -> float:
    """Return the predicted time of an optimizer step; each step is traced once per process.

    `compiled`: whether the model is under `torch.compile`; `pads`: whether that pads unaligned matrices.
    """
    eager = _traced(step)
    work = fusion.fuse(eager, pads=pads) if compiled else eager
    return seconds_per_step(work, rates, step.micro_batches, system)


def predicted_range(step: PlainStep, rates: Rates, *, compiled: bool) -> tuple[float, float]:
    """Return the shortest and the longest time of an optimizer step that are to be expected; arguments as above."""
    eager = _traced(step)
    return range_of_seconds(fusion.fuse(eager) if compiled else eager, rates, step.micro_batches)


def _seconds(row: Published) -> float:
    seconds = predicted_seconds(row.step, _rates(row), compiled=row.compiled, pads=row.pads, system=row.system)
    return seconds / row.step.micro_batches if row.of_a_micro_batch else seconds


@cache
def _traced(step: PlainStep) -> list[list[Operation]]:
    return trace_plain_step(step)


def _rates(row: Published) -> Rates:
    gpu = GPUS[row.gpu]
    rates = card_rates(gpu, max(gpu.fp16_tflops))
    if not row.tf32:
        return rates
    return replace(rates, single_tflops=TF32_TFLOPS[row.gpu], single_on_tensor_cores=True)


def _document(row: Comparison) -> ComparisonDocument:
    return {
        "name": row.published.name,
        "gpu": row.published.gpu,
        "published_ms": row.published.milliseconds,
        "published_ms_at_most": row.published.at_most,
        "predicted_ms": round(row.predicted_ms, 2),
        "error_percent": round(100 * row.error, 2),
    }
