"""`report.html` of a run folder: its curves, its speed, its memory against the plan, answers before and after, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowvram_chat.recipe.yaml_file import dump_recipe
from lowvram_chat.reporting.charts import Bar, bars, curves
from lowvram_chat.reporting.html import fill_legend, page, table
from lowvram_chat.training.run_dir import RunDir, read_result
from lowvram_chat.training.samples import read_samples
from lowvram_chat.units import MIB


def write_run_page(run: RunDir) -> Path:
    """Write a run's report and return its path."""
    run.report_file.write_text(run_page(run), encoding="utf-8")
    return run.report_file


def run_page(run: RunDir) -> str:
    """Return a run's report."""
    recipe, result = run.recipe(), read_result(run)
    lines = _lines(run.metrics_file)
    how = "full fine-tuning" if recipe.adapter is None else f"a {recipe.adapter.kind} adapter"
    source = recipe.data.source if isinstance(recipe.data.source, str) else ", ".join(recipe.data.source)
    return page(
        f"{run.path.name}: {how} of {recipe.model.name}",
        f"{result.get('steps', 0):,} steps on {source}.",
        [
            ("Result", _result(result)),
            ("Loss", _loss(lines, result)),
            (
                "Learning rate",
                curves("Learning rate", {"learning rate": _points(lines, "learning_rate")}, unit="1", x="step"),
            ),
            ("Throughput", _throughput(lines)),
            ("Memory", _memory(lines, result)),
            ("Answers before and after", _samples(run)),
            ("Settings", f'<pre tabindex="0">{escape(dump_recipe(recipe))}</pre>'),
        ],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(float(line["step"]), line[name]) for line in lines if name in line]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def _result(result: Mapping[str, Any]) -> str:
    known = {
        "held_out_loss_before": ("held-out loss before, nats a token", ".4f"),
        "held_out_loss_after": ("held-out loss after, nats a token", ".4f"),
        "training_loss": ("training loss, last logged", ".4f"),
        "steps": ("optimizer steps", ",d"),
        "real_tokens": ("tokens of the data", ",d"),
        "seconds": ("seconds", ",.0f"),
        "trained_parameters": ("trained parameters", ",d"),
        "parameters": ("parameters", ",d"),
    }
    rows = [
        [words, format(result[name], form)] for name, (words, form) in known.items() if result.get(name) is not None
    ]
    if result.get("real_tokens") and result.get("seconds"):
        rows.append(
            [
                "tokens a second, evaluations and checkpoints included",
                f"{result['real_tokens'] / result['seconds']:,.0f}",
            ]
        )
    return table("What came of it", ["what", "figure"], rows) if rows else ""


def _loss(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    held_out = _points(lines, "eval_loss")
    before, after = result.get("held_out_loss_before"), result.get("held_out_loss_after")
    if before is not None:
        held_out = [(0.0, before), *held_out]
    if after is not None:
        held_out = [*(point for point in held_out if point[0] < result["steps"]), (float(result["steps"]), after)]
    return curves("Loss", {"training": _points(lines, "loss"), "held out": held_out}, unit="nats a token", x="step")


def _throughput(lines: Sequence[Mapping[str, Any]]) -> str:
    series = {
        "of the data": _points(lines, "real_tokens_per_second"),
        "padding included": _points(lines, "padded_tokens_per_second"),
    }
    return curves("Tokens a second, measured", series, unit="tokens/s", x="step", from_zero=True)


def _memory(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    names = {
        "reserved": "peak_reserved_bytes",
        "allocated": "peak_allocated_bytes",
        "resident": "peak_resident_bytes",
    }
    measured = {
        f"{words}, measured": [(step, value / MIB) for step, value in _points(lines, name)]
        for words, name in names.items()
    }
    drawn = curves("Peak memory so far, measured", measured, unit="MiB", x="step", from_zero=True)
    plan = result.get("memory_plan")
    if not plan:
        return drawn
    rows = [_bar("reserved, predicted", plan["predicted_reserved_bytes"], "predicted")]
    if plan["measured_reserved_bytes"] is not None:
        rows.append(_bar("reserved, measured", plan["measured_reserved_bytes"], "measured"))
    return fill_legend() + bars("Peak on the card against the plan", rows, unit="MiB") + drawn


def _bar(label: str, nbytes: float, kind: Any) -> Bar:
    return Bar(label=label, value=nbytes / MIB, kind=kind, text=f"{nbytes / MIB:,.0f} MiB")


def _samples(run: RunDir) -> str:
    parts = []
    for sample in read_samples(run):
        parts.append(f"<h3>{escape(sample.prompt)}</h3>")
        for when, text in (("before", sample.before), ("after", sample.after)):
            if text is not None:
                parts.append(f"<p>{when}</p><blockquote>{escape(text) or '(nothing)'}</blockquote>")
    return "".join(parts)
