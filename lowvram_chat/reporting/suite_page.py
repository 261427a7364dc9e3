"""Writes the page of `bench report --html`, which shows stored benchmark results as charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lowvram_chat.gpus import DEFAULT_GPU
from lowvram_chat.reporting.charts import Bar, areas, bars
from lowvram_chat.reporting.html import fill_legend, folded, page, paragraph, table
from lowvram_chat.results.baseline import BASELINE_SECONDS, BASELINE_TOKENS_PER_SECOND
from lowvram_chat.results.record import Metric, Record, records_by_case
from lowvram_chat.units import format_hours

BASELINE_HOURS = BASELINE_SECONDS / 3600
WATTS = (80, 55, 40)
"""Power limits of an RTX 3050 Laptop that the speed benchmark predicts."""
SYSTEMS = ("linux", "windows")
OTHER_BENCHMARKS = ("merge", "plan_time", "tokenize")
"""Benchmarks that have no section of their own."""

SectionWriter = Callable[[Sequence[Record]], str]


def suite_page(records: Sequence[Record]) -> str:
    """Return the page of some results, which may come from several machines."""
    sections = [(heading, write_section(records)) for heading, write_section in SECTIONS.items()]
    return page("lowvram_chat benchmarks", _lead(records), sections)


def _lead(records: Sequence[Record]) -> str:
    """Return the number of results, with their machines, dates and commits."""
    machines = sorted({record.machine.name for record in records})
    dates = sorted({record.date[:10] for record in records if record.date})
    commits = sorted({record.commit for record in records if record.commit})
    lead = f"{len(records)} results from {', '.join(machines)}"
    if dates:
        lead += f", {dates[0]}" + (f" to {dates[-1]}" if dates[0] != dates[-1] else "")
    return lead + (f"; code {', '.join(commits)}." if commits else ".")


def _fit_section(records: Sequence[Record]) -> str:
    plans, runs = records_by_case(records, "vram"), records_by_case(records, "run")
    runs_on_cards = {name: record for name, record in runs.items() if record.machine.card}
    if runs_on_cards:
        return _plans_table(plans) + _runs_table(runs_on_cards) + _predictions_table(runs_on_cards)
    if not plans:
        return ""
    advice = "None of these results was measured on a card. python -m lowvram_chat.bench run RECIPE measures one."
    return _plans_table(plans) + paragraph(advice)


def _plans_table(plans: Mapping[str, Record]) -> str:
    rows = [[name.split(" on ")[0], *_fit_cells(record)] for name, record in plans.items()]
    head = ["recipe", "card", "peak, MiB", "Linux", "to spare, MiB", "Windows", "to spare, MiB"]
    return table("Predicted without a card: does each recipe fit?", head, rows) if rows else ""


def _fit_cells(record: Record) -> list[str]:
    cells = [str((record.recipe or {}).get("memory", {}).get("gpu", DEFAULT_GPU)), _value_text(record, "on_card")]
    for system in SYSTEMS:
        spare_mib = record.value(f"spare_{system}")
        if spare_mib is None:
            cells += ["-", "-"]
        else:
            cells += ["fits" if record.value(f"fits_{system}") else "DOES NOT FIT", f"{spare_mib:,.0f}"]
    return cells


def _runs_table(runs: Mapping[str, Record]) -> str:
    metrics = ("allocated", "reserved", "device", "tokens_per_second")
    rows = [
        [name, str(record.machine.card), record.status, *(_value_text(record, metric) for metric in metrics)]
        for name, record in runs.items()
    ]
    head = ["recipe", "card", "result", "allocated, MiB", "reserved, MiB", "whole device, MiB", "tokens/s"]
    return table("Measured on cards, with memory capped to the recipe's budget", head, rows)


def _predictions_table(runs: Mapping[str, Record]) -> str:
    metrics = ("predicted_reserved", "reserved", "predicted_tokens_per_second", "tokens_per_second")
    rows = [[name, *(_value_text(record, metric) for metric in metrics)] for name, record in runs.items()]
    head = ["recipe", "reserved, predicted", "measured", "tokens/s, predicted", "measured"]
    return table("Predicted and measured", head, rows)


def _memory_section(records: Sequence[Record]) -> str:
    charts: list[str] = []
    for name, record in records_by_case(records, "vram").items():
        chart = areas(
            f"{name}: allocated over a run, predicted",
            record.series,
            unit="MiB",
            limits=_card_limits(record),
            kind="predicted",
        )
        if chart:
            charts.append(folded(name, chart, is_open=not charts))
    lead = (
        "From left to right: loading, preflight, evaluation, the first step, full steps. "
        "Each position shows the peak of several consecutive allocations and frees."
    )
    return paragraph(lead) + "".join(charts) if charts else ""


def _card_limits(record: Record) -> dict[str, float]:
    limits = {system: record.value(f"limit_{system}") for system in SYSTEMS}
    return {
        f"4 GB card, {system}, without the CUDA context": limit for system, limit in limits.items() if limit is not None
    }


def _speed_section(records: Sequence[Record]) -> str:
    charts = _predicted_speed_chart(records) + _throughput_charts(records) + _run_speed_charts(records)
    return fill_legend() + charts if charts else ""


def _predicted_speed_chart(records: Sequence[Record]) -> str:
    predicted = [
        _bar(name, record.metrics["tokens_per_second_80w"])
        for name, record in records_by_case(records, "baseline").items()
        if "tokens_per_second_80w" in record.metrics
    ]
    title = "Tokens per second on an RTX 3050 Laptop at 80 W, predicted"
    return bars(title, [*predicted, _baseline_bar()], unit="tokens/s") if predicted else ""


def _throughput_charts(records: Sequence[Record]) -> str:
    charts = []
    for model, cases in _by_model(records_by_case(records, "throughput")).items():
        machines = ", ".join(sorted({record.machine.name for record in cases.values()}))
        rows = [_bar(name, record.metrics["tokens_per_second"]) for name, record in cases.items()]
        title = f"Tokens per second without padding, {model} model, measured on {machines}"
        charts.append(bars(title, rows, unit="tokens/s"))
    return "".join(charts)


def _run_speed_charts(records: Sequence[Record]) -> str:
    charts = []
    for name, record in records_by_case(records, "run").items():
        if "tokens_per_second" not in record.metrics:
            continue
        rates = [record.metrics.get(metric) for metric in ("tokens_per_second", "predicted_tokens_per_second")]
        rows = [_bar(f"{name}, {rate.kind}", rate) for rate in rates if rate is not None]
        title = f"{name} on {record.machine.card or record.machine.name}"
        charts.append(bars(title, [*rows, _baseline_bar()], unit="tokens/s"))
    return "".join(charts)


def _baseline_bar() -> Bar:
    rate = BASELINE_TOKENS_PER_SECOND
    return Bar(label="the baseline", value=rate, kind="published", text=f"{rate:,.0f}")


def _hours_section(records: Sequence[Record]) -> str:
    cases = records_by_case(records, "baseline")
    charts = "".join(_hours_chart(cases, watts) for watts in WATTS)
    return fill_legend() + charts if charts else ""


def _hours_chart(cases: Mapping[str, Record], watts: int) -> str:
    metric = f"three_baseline_epochs_{watts}w"
    rows = [_bar(name, record.metrics[metric]) for name, record in cases.items() if metric in record.metrics]
    limits = [limit for record in cases.values() if (limit := record.value(f"limit_{metric}")) is not None]
    marks = {f"published: {format_hours(BASELINE_HOURS)}": BASELINE_HOURS}
    if limits:
        marks[f"full fine-tuning at the card's peak rate: {format_hours(min(limits))}"] = min(limits)
    return bars(f"Three baseline epochs at {watts} W, predicted", rows, unit="h", marks=marks)


def _errors_section(records: Sequence[Record]) -> str:
    charts = []
    for case, record in records_by_case(records, "planner").items():
        rows = [
            Bar(
                label=name.removesuffix(" error"),
                value=abs(metric.value),
                kind="predicted",
                text=f"{metric.value:+.2f} %",
            )
            for name, metric in record.metrics.items()
            if name.endswith(" error") and metric.unit == "%"
        ]
        charts.append(bars(f"{case}: error of the prediction for each published measurement", rows, unit="%"))
    return "".join(charts)


def _ablation_section(records: Sequence[Record]) -> str:
    charts = []
    for model, cases in _by_model(records_by_case(records, "ablation")).items():
        rows = [_bar(name.split(" ", 1)[1], record.metrics["tokens_per_second"]) for name, record in cases.items()]
        title = f"{model} model: each substitution added to those above it, measured"
        charts.append(bars(title, rows, unit="tokens/s"))
    return "".join(charts)


def _other_section(records: Sequence[Record]) -> str:
    rows = [
        [record.benchmark, record.case, name.replace("_", " "), metric.kind, f"{metric.value:,.4g}", metric.unit]
        for record in records
        if record.benchmark in OTHER_BENCHMARKS
        for name, metric in record.metrics.items()
    ]
    head = ["benchmark", "case", "metric", "kind", "value", "unit"]
    return table("Proofs of merges, time to plan, time to tokenise", head, rows) if rows else ""


def _all_section(records: Sequence[Record]) -> str:
    rows = [
        [r.benchmark, r.case, r.case_version, r.status, r.reason or "", r.machine.name, r.commit or "-", r.date[:10]]
        for r in records
    ]
    head = ["benchmark", "case", "version", "result", "reason", "machine", "commit", "date"]
    return table("All cases", head, rows)


SECTIONS: Mapping[str, SectionWriter] = {
    "Does it fit?": _fit_section,
    "Memory over a run": _memory_section,
    "Speed": _speed_section,
    "Compared with the published 7 h 27 m": _hours_section,
    "How accurate are the predictions?": _errors_section,
    "Gain of each substitution": _ablation_section,
    "Other checks": _other_section,
    "All results": _all_section,
}
"""Heading -> writer of the section's HTML, which is empty if there are no results for it."""


def _bar(label: str, metric: Metric) -> Bar:
    spread = "" if metric.p20 is None or metric.p80 is None else f" ({metric.p20:,.0f} to {metric.p80:,.0f})"
    text = format_hours(metric.value) if metric.unit == "h" else f"{metric.value:,.0f}{spread}"
    return Bar(label=label, value=metric.value, kind=metric.kind, text=text)


def _by_model(cases: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """Return model -> case -> record for cases that are named "<model>: <case>"."""
    groups: dict[str, dict[str, Record]] = {}
    for name, record in cases.items():
        model, _, case = name.partition(": ")
        groups.setdefault(model, {})[case] = record
    return groups


def _value_text(record: Record, metric: str) -> str:
    value = record.value(metric)
    return "-" if value is None else f"{value:,.0f}"
