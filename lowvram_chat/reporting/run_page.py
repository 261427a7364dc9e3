"""Writes `report.html` of a run folder: loss, speed, memory against the plan, answers before and after, and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe
from lowvram_chat.reporting.charts import Bar, bars, curves
from lowvram_chat.reporting.html import fill_legend, page, table
from lowvram_chat.reporting.svg import Point
from lowvram_chat.results.record import MetricKind
from lowvram_chat.training.metrics_file import read_metrics
from lowvram_chat.training.run_dir import Result, RunDir, read_result
from lowvram_chat.training.samples import read_samples
from lowvram_chat.units import MIB, format_mib

RESULT_ROWS = {
    "held_out_loss_before": ("held-out loss before, nats per token", ".4f"),
    "held_out_loss_after": ("held-out loss after, nats per token", ".4f"),
    "training_loss": ("training loss, last logged", ".4f"),
    "steps": ("optimizer steps", ",d"),
    "real_tokens": ("tokens, without padding", ",d"),
    "seconds": ("seconds", ",.0f"),
    "trained_parameters": ("trained parameters", ",d"),
    "parameters": ("parameters", ",d"),
}
"""Key of result.json -> label and number format."""
MEMORY_SERIES = {
    "reserved, measured": "peak_reserved_bytes",
    "allocated, measured": "peak_allocated_bytes",
    "resident, measured": "peak_resident_bytes",
}
"""Name of a curve -> key of metrics.jsonl."""
THROUGHPUT_SERIES = {"without padding": "real_tokens_per_second", "with padding": "padded_tokens_per_second"}
"""Name of a curve -> key of metrics.jsonl."""

MetricLine = Mapping[str, object]
"""One line of metrics.jsonl."""


def write_run_page(run: RunDir) -> Path:
    """Write the report of a run into its folder and return its path."""
    run.report_file.write_text(run_page(run), encoding="utf-8")
    return run.report_file


def run_page(run: RunDir) -> str:
    """Return the report of a run as HTML. A run that has not finished has a report too."""
    recipe, result = run.recipe(), read_result(run)
    lines = read_metrics(run)
    sections = [
        ("Result", _result_table(result)),
        ("Loss", _loss_chart(lines, result)),
        ("Learning rate", _learning_rate_chart(lines)),
        ("Throughput", _throughput_chart(lines)),
        ("Memory", _memory_charts(lines, result)),
        ("Answers before and after", _answers(run)),
        ("Settings", f'<pre tabindex="0">{escape(dump_recipe(recipe))}</pre>'),
    ]
    source = recipe.data.source if isinstance(recipe.data.source, str) else ", ".join(recipe.data.source)
    return page(_title(run, recipe), f"{result.get('steps', 0):,} steps on {source}.", sections)


def _title(run: RunDir, recipe: Recipe) -> str:
    method = "full fine-tuning" if recipe.adapter is None else f"a {recipe.adapter.kind} adapter"
    return f"{run.path.name}: {method} of {recipe.model.name}"


def _points(lines: Sequence[MetricLine], name: str) -> list[Point]:
    """Return the (step, value) points of a metric, without values that are not finite."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _result_table(result: Result) -> str:
    rows = [
        [label, format(result[name], number_format)]
        for name, (label, number_format) in RESULT_ROWS.items()
        if result.get(name) is not None
    ]
    if result.get("real_tokens") and result.get("seconds"):
        rate = result["real_tokens"] / result["seconds"]
        rows.append(["tokens per second, including evaluations and checkpoints", f"{rate:,.0f}"])
    return table("Result of the run", ["quantity", "value"], rows) if rows else ""


def _loss_chart(lines: Sequence[MetricLine], result: Result) -> str:
    held_out = _points(lines, "eval_loss")
    before, after = result.get("held_out_loss_before"), result.get("held_out_loss_after")
    if before is not None:
        held_out = [(0.0, before), *held_out]
    if after is not None:
        held_out = [*(point for point in held_out if point[0] < result["steps"]), (float(result["steps"]), after)]
    series = {"training": _points(lines, "loss"), "held out": held_out}
    return curves("Loss", series, unit="nats per token", x="step")


def _learning_rate_chart(lines: Sequence[MetricLine]) -> str:
    return curves("Learning rate", {"learning rate": _points(lines, "learning_rate")}, unit="1", x="step")


def _throughput_chart(lines: Sequence[MetricLine]) -> str:
    series = {name: _points(lines, key) for name, key in THROUGHPUT_SERIES.items()}
    return curves("Tokens per second, measured", series, unit="tokens/s", x="step", from_zero=True)


def _memory_charts(lines: Sequence[MetricLine], result: Result) -> str:
    measured = {
        name: [(step, nbytes / MIB) for step, nbytes in _points(lines, key)] for name, key in MEMORY_SERIES.items()
    }
    chart = curves("Peak memory so far, measured", measured, unit="MiB", x="step", from_zero=True)
    plan = result.get("memory_plan")
    if not plan:
        return chart
    rows = [_memory_bar("reserved, predicted", plan["predicted_reserved_bytes"], "predicted")]
    if plan["measured_reserved_bytes"] is not None:
        rows.append(_memory_bar("reserved, measured", plan["measured_reserved_bytes"], "measured"))
    return fill_legend() + bars("Peak GPU memory, planned and measured", rows, unit="MiB") + chart


def _memory_bar(label: str, nbytes: float, kind: MetricKind) -> Bar:
    return Bar(label=label, value=nbytes / MIB, kind=kind, text=f"{format_mib(nbytes)} MiB")


def _answers(run: RunDir) -> str:
    parts = []
    for sample in read_samples(run):
        parts.append(f"<h3>{escape(sample.prompt)}</h3>")
        for when, answer in (("before", sample.before), ("after", sample.after)):
            if answer is not None:
                parts.append(f"<p>{when}</p><blockquote>{escape(answer) or '(empty answer)'}</blockquote>")
    return "".join(parts)
