"""Prints stored benchmark results as a table: `bench report`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from rich.console import Console
from rich.table import Table

from lowvram_chat.results.record import MetricKind, Record

SHOWN_KINDS: tuple[MetricKind, ...] = ("predicted", "measured")
MAX_SHOWN_METRICS = 3
"""Metrics of a case and kind that the table shows."""


def text_table(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table with the first metrics of every case."""
    rows = []
    for record in records:
        texts: dict[str, list[str]] = {kind: [] for kind in get_args(MetricKind)}
        for name, metric in record.metrics.items():
            text = f"{name.replace('_', ' ')} {metric.value:,.4g} {metric.unit}"
            texts[metric.kind].append(text.removesuffix(" 1"))
        cells = ["; ".join(texts[kind][:MAX_SHOWN_METRICS]) for kind in SHOWN_KINDS]
        rows.append([record.benchmark, record.case, record.status, *cells])
    return ["benchmark", "case", "result", *SHOWN_KINDS], rows


def show_results(records: Iterable[Record]) -> None:
    """Print the table on stdout."""
    head, rows = text_table(records)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)
