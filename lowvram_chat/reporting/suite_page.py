"""`bench report`: what the stored results of the benchmarks say, as one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from lowvram_chat.recipe.schema import Memory
from lowvram_chat.reporting.charts import Bar, areas, bars
from lowvram_chat.reporting.html import fill_legend, folded, page, paragraph, table
from lowvram_chat.results.baseline import BASELINE_SECONDS, BASELINE_TOKENS_PER_SECOND
from lowvram_chat.results.record import Metric, MetricKind, Record, records_by_case

BASELINE_HOURS = BASELINE_SECONDS / 3600

SectionWriter = Callable[[Sequence[Record]], str]


def suite_page(records: Sequence[Record]) -> str:
    """Return the report of results, which may be of several machines."""
    machines = sorted({record.machine.name for record in records})
    dates = sorted({record.date[:10] for record in records if record.date})
    commits = sorted({record.commit for record in records if record.commit})
    lead = f"{len(records)} results from {', '.join(machines)}"
    lead += f", {dates[0]}" + (f" to {dates[-1]}" if dates[0] != dates[-1] else "") if dates else ""
    lead += f"; code {', '.join(commits)}." if commits else "."
    return page("lowvram_chat benchmarks", lead, [(heading, make(records)) for heading, make in SECTIONS.items()])


def _verdicts(records: Sequence[Record]) -> str:
    planned, runs = records_by_case(records, "vram"), records_by_case(records, "run")
    parts = []
    if planned:
        rows = [[name.split(" on ")[0], *_fits(record)] for name, record in planned.items()]
        head = ["recipe", "card", "peak, MiB", "Linux", "to spare, MiB", "Windows", "to spare, MiB"]
        parts.append(table("Predicted, on no card: does each recipe fit?", head, rows))
    on_cards = {name: record for name, record in runs.items() if record.machine.card}
    if on_cards:
        head = ["recipe", "card", "result", "allocated, MiB", "reserved, MiB", "whole device, MiB", "tokens/s"]
        names = ("allocated", "reserved", "device", "tokens_per_second")
        rows = [
            [n, str(r.machine.card), r.status, *(_figure(r, metric) for metric in names)] for n, r in on_cards.items()
        ]
        parts.append(table("Measured on cards, the process held to the recipe's budget", head, rows))
        head = ["recipe", "reserved, predicted", "measured", "tokens/s, predicted", "measured"]
        pairs = ("predicted_reserved", "reserved", "predicted_tokens_per_second", "tokens_per_second")
        rows = [[n, *(_figure(r, metric) for metric in pairs)] for n, r in on_cards.items()]
        parts.append(table("Predicted beside measured", head, rows))
    elif parts:
        parts.append(
            paragraph("No result here was measured on a card: python -m lowvram_chat.bench run RECIPE makes one.")
        )
    return "".join(parts)


def _fits(record: Record) -> list[str]:
    cells = [str((record.recipe or {}).get("memory", {}).get("gpu", Memory().gpu)), _figure(record, "on_card")]
    for system in ("linux", "windows"):
        spare = record.value(f"spare_{system}")
        fits = record.value(f"fits_{system}")
        cells += [
            "-" if spare is None else "fits" if fits else "DOES NOT FIT",
            "-" if spare is None else f"{spare:,.0f}",
        ]
    return cells


def _memory(records: Sequence[Record]) -> str:
    drawn: list[str] = []
    for name, record in records_by_case(records, "vram").items():
        limits = {
            f"4 GB card, {system}, less the context": value
            for system in ("linux", "windows")
            if (value := record.value(f"limit_{system}")) is not None
        }
        plot = areas(
            f"{name}: allocated over a run, predicted", record.series, unit="MiB", limits=limits, kind="predicted"
        )
        if plot:
            drawn.append(folded(name, plot, is_open=not drawn))
    lead = "From the left: loading, rehearsal, evaluation, the first step, full steps; each place is the most of a stretch."
    return paragraph(lead) + "".join(drawn) if drawn else ""


def _speed(records: Sequence[Record]) -> str:
    predicted = [
        _bar(name, record.metrics["tokens_per_second_80w"])
        for name, record in records_by_case(records, "baseline").items()
        if "tokens_per_second_80w" in record.metrics
    ]
    published = Bar(
        label="the baseline",
        value=BASELINE_TOKENS_PER_SECOND,
        kind="published",
        text=f"{BASELINE_TOKENS_PER_SECOND:,.0f}",
    )
    parts = []
    if predicted:
        parts.append(
            bars("Tokens a second on an RTX 3050 Laptop at 80 W, predicted", [*predicted, published], unit="tokens/s")
        )
    for model, cases in _by_model(records_by_case(records, "throughput")).items():
        rows = [_bar(name, record.metrics["tokens_per_second"]) for name, record in cases.items()]
        machines = ", ".join(sorted({record.machine.name for record in cases.values()}))
        parts.append(bars(f"Real tokens a second, {model} model, measured on {machines}", rows, unit="tokens/s"))
    for name, record in records_by_case(records, "run").items():
        if "tokens_per_second" in record.metrics:
            pair = [m for m in ("tokens_per_second", "predicted_tokens_per_second") if m in record.metrics]
            rows = [_bar(f"{name}, {record.metrics[metric].kind}", record.metrics[metric]) for metric in pair]
            parts.append(
                bars(f"{name} on {record.machine.card or record.machine.name}", [*rows, published], unit="tokens/s")
            )
    return fill_legend() + "".join(parts) if parts else ""


def _hours(records: Sequence[Record]) -> str:
    cases = records_by_case(records, "baseline")
    parts = []
    for watts in (80, 55, 40):
        name = f"three_baseline_epochs_{watts}w"
        rows = [_bar(case, record.metrics[name]) for case, record in cases.items() if name in record.metrics]
        limits = [
            value for r in cases.values() if (value := r.value(f"limit_three_baseline_epochs_{watts}w")) is not None
        ]
        if rows:
            marks = {f"published: {format_hours(BASELINE_HOURS)}": BASELINE_HOURS}
            if limits:
                marks[f"full fine-tuning at the card's peak rate: {format_hours(min(limits))}"] = min(limits)
            parts.append(bars(f"Three baseline epochs at {watts} W, predicted", rows, unit="h", marks=marks))
    return fill_legend() + "".join(parts) if parts else ""


def _errors(records: Sequence[Record]) -> str:
    parts = []
    for case, record in records_by_case(records, "planner").items():
        rows = [
            Bar(label=name.removesuffix(" error"), value=abs(m.value), kind="predicted", text=f"{m.value:+.2f} %")
            for name, m in record.metrics.items()
            if name.endswith(" error") and m.unit == "%"
        ]
        parts.append(bars(f"{case}: error of the prediction for each published row", rows, unit="%"))
    return "".join(parts)


def _ablation(records: Sequence[Record]) -> str:
    parts = []
    for model, cases in _by_model(records_by_case(records, "ablation")).items():
        rows = [_bar(name.split(" ", 1)[1], record.metrics["tokens_per_second"]) for name, record in cases.items()]
        parts.append(
            bars(f"{model} model: each substitution on top of those above it, measured", rows, unit="tokens/s")
        )
    return "".join(parts)


def _others(records: Sequence[Record]) -> str:
    shown = ("merge", "plan_time", "tokenize")
    rows = [
        [record.benchmark, record.case, name.replace("_", " "), metric.kind, f"{metric.value:,.4g}", metric.unit]
        for record in records
        if record.benchmark in shown
        for name, metric in record.metrics.items()
    ]
    head = ["benchmark", "case", "what", "kind", "figure", "unit"]
    return table("Merge proofs, the planner's own time, tokenising", head, rows) if rows else ""


def _all(records: Sequence[Record]) -> str:
    rows = [
        [r.benchmark, r.case, r.case_version, r.status, r.reason or "", r.machine.name, r.commit or "-", r.date[:10]]
        for r in records
    ]
    head = ["benchmark", "case", "version", "result", "reason", "machine", "commit", "date"]
    return table("Every case", head, rows)


SECTIONS: Mapping[str, SectionWriter] = {
    "Does it fit?": _verdicts,
    "Memory over a step": _memory,
    "Speed": _speed,
    "Beside the 7 h 27 m": _hours,
    "How wrong are the predictions?": _errors,
    "What each substitution brings": _ablation,
    "Other checks": _others,
    "All results": _all,
}


def _bar(label: str, metric: Metric) -> Bar:
    spread = "" if metric.p20 is None or metric.p80 is None else f" ({metric.p20:,.0f} to {metric.p80:,.0f})"
    text = format_hours(metric.value) if metric.unit == "h" else f"{metric.value:,.0f}{spread}"
    return Bar(label=label, value=metric.value, kind=metric.kind, text=text)


def _by_model(cases: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """Return model -> case -> record of cases that are named `model: case`."""
    found: dict[str, dict[str, Record]] = {}
    for name, record in cases.items():
        model, _, case = name.partition(": ")
        found.setdefault(model, {})[case] = record
    return found


def _figure(record: Record, metric: str) -> str:
    value = record.value(metric)
    return "-" if value is None else f"{value:,.0f}"


def format_hours(hours: float) -> str:
    """Return hours in words: "2 h 59 m"."""
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def text_table(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Return (head, rows) of every case's first figures, for the terminal."""
    kinds = ("predicted", "measured")
    rows = []
    for record in records:
        figures: dict[str, list[str]] = {kind: [] for kind in get_args(MetricKind)}
        for name, metric in record.metrics.items():
            figures[metric.kind].append(
                f"{name.replace('_', ' ')} {metric.value:,.4g} {metric.unit}".removesuffix(" 1")
            )
        rows.append([record.benchmark, record.case, record.status, *("; ".join(figures[kind][:3]) for kind in kinds)])
    return ["benchmark", "case", "result", *kinds], rows
