"""Writes a self-test as a page and as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from lowvram_chat.reporting.html import page, table
from lowvram_chat.results.record import CheckResult, Metric, Record

MARKS = {"ok": "ok", "failed": "FAILED", "skipped": "--"}


def result_line(result: CheckResult) -> str:
    """Return a check as lines for the terminal."""
    figures = "; ".join(f"{name.rpartition(': ')[2]} {figure_text(metric)}" for name, metric in result.figures.items())
    lines = f"{MARKS[result.status]:<7}{result.title:<34}{figures}"
    return lines.rstrip() + (f"\n{'':<7}{result.meaning}" if result.meaning else "")


def figure_text(metric: Metric) -> str:
    """Return a figure with its unit."""
    value = f"{metric.value:,.0f}" if abs(metric.value) >= 100 else f"{metric.value:.3g}"
    return value if metric.unit == "1" else f"{value} {metric.unit}"


def selftest_page(record: Record) -> str:
    """Return the page of a self-test, which is one file without anything personal."""
    here = record.machine
    title = f"Self-test of {here.card or here.processor_model or here.processor}"
    counts = {status: sum(check.status == status for check in record.checks) for status in MARKS}
    lead = (
        f"{counts['ok']} checks ok, {counts['failed']} failed, {counts['skipped']} not for this device; {record.date}."
    )
    sections = [
        ("Checks", table("Every check, with what it means for a run", _HEAD, _rows(record))),
        ("Recipes", _recipes_table(record)),
        ("Machine", table("Machine and versions", ["what", "value"], _machine_rows(record))),
    ]
    return page(title, lead, sections)


_HEAD = ["check", "result", "figures", "meaning", "seconds"]


def _rows(record: Record) -> Iterator[list[str]]:
    for check in record.checks:
        figures = ", ".join(
            f"{name.rpartition(': ')[2]} {figure_text(metric)}" for name, metric in check.figures.items()
        )
        yield [
            check.title,
            {"ok": "passed"}.get(check.status, check.status),
            figures,
            check.meaning,
            f"{check.seconds:.1f}",
        ]


def _recipes_table(record: Record) -> str:
    """Return predicted and measured peaks and speeds of the shipped recipes."""
    names = sorted({name.partition(": ")[0] for name in record.metrics if name.endswith(": tokens/s")})
    kinds = ("reserved", "predicted reserved", "tokens/s", "predicted tokens/s")
    rows = [
        [name, *(figure_text(m) if (m := record.metrics.get(f"{name}: {kind}")) else "-" for kind in kinds)]
        for name in names
    ]
    head = ["recipe", "reserved, measured", "predicted", "speed, measured", "predicted"]
    return table("Recipes with random weights and rows of the maximum length", head, rows) if rows else ""


def _machine_rows(record: Record) -> Iterator[list[str]]:
    here = record.machine
    yield ["platform", here.platform]
    yield ["processor", here.processor_model or here.processor]
    yield ["card", here.card or "none"]
    if here.power_limit_watts:
        yield ["power limit", f"{here.power_limit_watts:.0f} W"]
    yield ["Python", here.python]
    yield from ([name, version] for name, version in here.libraries.items())
