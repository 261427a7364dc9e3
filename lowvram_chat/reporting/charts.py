"""Charts in HTML and SVG that need no script. The data of each chart is also a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lowvram_chat.reporting import svg
from lowvram_chat.reporting.html import folded, table
from lowvram_chat.results.record import MetricKind

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
"""Colours of series. Source: the palette of Okabe and Ito, which colour-blind people can tell apart."""
MAX_TABLE_ROWS = 24
"""Rows of the table below a chart, give or take the last point and the peak."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    kind: MetricKind
    text: str
    """The value with its unit, as shown beside the bar."""


def bars(title: str, rows: Sequence[Bar], *, unit: str, marks: Mapping[str, float] | None = None) -> str:
    """Return a horizontal bar chart of values that are not negative.

    `marks` (label -> value) are vertical lines across all bars.
    """
    if not rows:
        return ""
    marks = marks or {}
    longest = max([*(bar.value for bar in rows), *marks.values()]) or 1.0
    lines = "".join(
        f'<b style="left:{100 * value / longest:.2f}%" title="{escape(label)}"></b>' for label, value in marks.items()
    )
    items = "".join(_bar_item(bar, longest, lines) for bar in rows)
    legend = f"<p>Red lines: {escape('; '.join(marks))}.</p>" if marks else ""
    return _figure(title, f'{legend}<ul class="bars">{items}</ul>', _bars_table(f"{title} ({unit})", rows))


def areas(
    title: str, series: Mapping[str, Sequence[float]], *, unit: str, limits: Mapping[str, float], kind: MetricKind
) -> str:
    """Return a stacked area chart, hatched if the values are predicted.

    All series have the same length; each value holds until the next position. `limits` (label -> value) are horizontal lines.
    """
    series = {name: values for name, values in series.items() if any(values)}
    if not series:
        return ""
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    top = 1.05 * max([*totals, *limits.values()])
    shapes = _stacked_bands(series, top)
    if kind == "predicted":
        shapes += f'<path fill="url(#hatch)" d="{svg.band_path([0.0] * len(totals), totals, top)}"/>'
    axes = svg.Axes(high=top, unit=unit, ends=("first", "last"), limits=limits)
    peak = max(range(len(totals)), key=totals.__getitem__)
    caption = f"{title} ({unit}, {kind}; the peak is at position {peak + 1} of {len(totals)})"
    plot = svg.plot(title, svg.HATCH_PATTERN + shapes, axes)
    return _figure(title, _legend(series) + plot, _areas_table(caption, series, totals, peak))


def curves(
    title: str,
    series: Mapping[str, Sequence[svg.Point]],
    *,
    unit: str,
    x: str,
    limits: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """Return a line chart of (x, y) points. `limits` (label -> value) are horizontal lines."""
    series = {name: points for name, points in series.items() if points}
    points = [point for points in series.values() for point in points]
    if not points:
        return ""
    limits = limits or {}
    low, high = _value_range([*(y for _, y in points), *limits.values()], from_zero=from_zero)
    first, last = min(point[0] for point in points), max(point[0] for point in points)
    axes = svg.Axes(low=low, high=high, unit=unit, ends=(f"{x} {first:g}", f"{x} {last:g}"), limits=limits)
    shapes = "".join(
        svg.line(line_points, colour, axes, first, last)
        for colour, line_points in zip(_colours(series), series.values(), strict=True)
    )
    tables = "".join(
        table(f"{title}: {name}", [x, unit], [[f"{a:g}", f"{b:.6g}"] for a, b in _sampled(line_points)])
        for name, line_points in series.items()
    )
    return _figure(title, _legend(series) + svg.plot(title, shapes, axes), tables)


def _bar_item(bar: Bar, longest: float, lines: str) -> str:
    return (
        f'<li><div class="label"><span>{escape(bar.label)}</span><span>{escape(bar.text)}</span></div>'
        f'<div class="track" aria-hidden="true"><i class="{bar.kind}" style="width:{100 * bar.value / longest:.2f}%"></i>'
        f"{lines}</div></li>"
    )


def _bars_table(caption: str, rows: Sequence[Bar]) -> str:
    """Return the data of a bar chart, with a column for each kind."""
    kinds = list(dict.fromkeys(bar.kind for bar in rows))
    texts = [[bar.label, *(bar.text if bar.kind == kind else "" for kind in kinds)] for bar in rows]
    return table(caption, ["name", *kinds], texts)


def _areas_table(caption: str, series: Mapping[str, Sequence[float]], totals: Sequence[float], peak: int) -> str:
    """Return some positions of an area chart, the peak among them."""
    step = max(1, len(totals) // MAX_TABLE_ROWS)
    rows = [
        [position + 1, *(f"{values[position]:,.0f}" for values in series.values()), f"{totals[position]:,.0f}"]
        for position in sorted({*range(0, len(totals), step), peak})
    ]
    return table(caption, ["position", *series, "total"], rows)


def _stacked_bands(series: Mapping[str, Sequence[float]], top: float) -> str:
    bands = []
    below = [0.0] * len(next(iter(series.values())))
    for colour, values in zip(_colours(series), series.values(), strict=True):
        above = [lower + value for lower, value in zip(below, values, strict=True)]
        bands.append(f'<path fill="{colour}" d="{svg.band_path(below, above, top)}"/>')
        below = above
    return "".join(bands)


def _value_range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """Return the lowest and the highest value of a vertical axis, with a margin of 5 %."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - (0 if from_zero else margin), high + margin


def _figure(title: str, chart: str, data_table: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{chart}{folded('As a table', data_table)}</figure>"


def _colours(series: Mapping[str, object]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(series))]


def _legend(series: Mapping[str, object]) -> str:
    items = "".join(
        f'<li><i style="background:{colour}" aria-hidden="true"></i>{escape(name)}</li>'
        for colour, name in zip(_colours(series), series, strict=True)
    )
    return f'<ul class="key">{items}</ul>'


def _sampled(points: Sequence[svg.Point]) -> list[svg.Point]:
    """Return about `MAX_TABLE_ROWS` points, the last one among them."""
    step = max(1, len(points) // MAX_TABLE_ROWS)
    sampled = list(points[::step])
    return sampled if sampled[-1] == points[-1] else [*sampled, points[-1]]
