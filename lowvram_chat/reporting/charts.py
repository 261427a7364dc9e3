"""Plots as HTML and SVG that need no script; behind each stands its table. Text is HTML, so that it stays legible when narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lowvram_chat.reporting.html import folded, table
from lowvram_chat.results.record import MetricKind

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
"""Of series. Source: Okabe and Ito's palette, which the colour-blind can tell apart."""
PLOT_WIDTH, PLOT_HEIGHT = 1000, 300
"""Of a plot's own coordinates; it is stretched to its place."""
MAX_TABLE_ROWS = 24
"""Of the table behind a curve."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar and its words."""

    label: str
    value: float
    kind: MetricKind
    text: str
    """The figure as it is read."""


def bars(title: str, rows: Sequence[Bar], *, unit: str, marks: Mapping[str, float] | None = None) -> str:
    """Return horizontal bars of what is not negative; `marks` (words -> value) are lines across all of them."""
    if not rows:
        return ""
    marks = marks or {}
    top = max([*(bar.value for bar in rows), *marks.values()]) or 1.0
    lines = "".join(
        f'<b style="left:{100 * value / top:.2f}%" title="{escape(name)}"></b>' for name, value in marks.items()
    )
    items = "".join(
        f'<li><div class="label"><span>{escape(bar.label)}</span><span>{escape(bar.text)}</span></div>'
        f'<div class="track" aria-hidden="true"><i class="{bar.kind}" style="width:{100 * bar.value / top:.2f}%"></i>'
        f"{lines}</div></li>"
        for bar in rows
    )
    told = f"<p>Red lines: {escape('; '.join(marks))}.</p>" if marks else ""
    kinds = list(dict.fromkeys(bar.kind for bar in rows))
    texts = [[bar.label, *(bar.text if bar.kind == kind else "" for kind in kinds)] for bar in rows]
    behind = table(f"{title} ({unit})", ["what", *kinds], texts)
    return _figure(title, f'{told}<ul class="bars">{items}</ul>', behind)


def areas(
    title: str, series: Mapping[str, Sequence[float]], *, unit: str, limits: Mapping[str, float], kind: MetricKind
) -> str:
    """Return series stacked over the same places, with lines at `limits` (words -> value); hatched where predicted."""
    series = {name: values for name, values in series.items() if any(values)}
    count = len(next(iter(series.values()), ()))
    if not count:
        return ""
    sums = [sum(values[place] for values in series.values()) for place in range(count)]
    top = 1.05 * max([*sums, *limits.values()])
    below, shapes = [0.0] * count, []
    for colour, values in zip(_colours(series), series.values(), strict=True):
        above = [one + other for one, other in zip(below, values, strict=True)]
        shapes.append(f'<path fill="{colour}" d="{_outline(below, above, top)}"/>')
        below = above
    if kind == "predicted":
        shapes.append(f'<path fill="url(#hatch)" d="{_outline([0.0] * count, sums, top)}"/>')
    pattern = (
        '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V7" stroke="#fff" stroke-opacity=".55" stroke-width="2.5"/></pattern></defs>'
    )
    drawn = _plot(title, pattern + "".join(shapes), top, unit, limits, ("first", "last"))
    peak = max(range(count), key=sums.__getitem__)
    places = sorted({*range(0, count, max(1, count // MAX_TABLE_ROWS)), peak})
    behind = table(
        f"{title} ({unit}, {kind}; the peak is at place {peak + 1} of {count})",
        ["place", *series, "all"],
        [[place + 1, *(f"{v[place]:,.0f}" for v in series.values()), f"{sums[place]:,.0f}"] for place in places],
    )
    return _figure(title, _legend(series) + drawn, behind)


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    unit: str,
    x: str,
    limits: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """Return lines through (x, y) points, with lines across at `limits`."""
    series = {name: points for name, points in series.items() if points}
    every = [point for points in series.values() for point in points]
    if not every:
        return ""
    heights = [height for _, height in every] + list((limits or {}).values())
    low, high = (0.0 if from_zero else min(heights)), max(heights)
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    low, high = low - (0 if from_zero else margin), high + margin
    first, last = min(place for place, _ in every), max(place for place, _ in every)
    wide = (last - first) or 1.0
    shapes = []
    for colour, points in zip(_colours(series), series.values(), strict=True):
        dots = [((place - first) / wide, (height - low) / (high - low)) for place, height in points]
        path = "L".join(f"{PLOT_WIDTH * a:.1f} {PLOT_HEIGHT * (1 - b):.1f}" for a, b in dots)
        path += "h.01" if len(dots) == 1 else ""
        stroke = f'stroke="{colour}" stroke-width="{6 if len(dots) == 1 else 2}" stroke-linecap="round"'
        shapes.append(f'<path fill="none" {stroke} d="M{path}"/>')
    drawn = _plot(title, "".join(shapes), high, unit, limits or {}, (f"{x} {first:g}", f"{x} {last:g}"), low)
    behind = "".join(
        table(f"{title}: {name}", [x, unit], [[f"{a:g}", f"{b:.6g}"] for a, b in _few(points)])
        for name, points in series.items()
    )
    return _figure(title, _legend(series) + drawn, behind)


def _figure(title: str, drawn: str, behind: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawn}{folded('As a table', behind)}</figure>"


def _colours(series: Mapping[str, object]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(series))]


def _legend(series: Mapping[str, object]) -> str:
    pairs = zip(_colours(series), series, strict=True)
    items = "".join(f'<li><i style="background:{c}" aria-hidden="true"></i>{escape(name)}</li>' for c, name in pairs)
    return f'<ul class="key">{items}</ul>'


def _plot(  # noqa: PLR0917
    title: str, shapes: str, top: float, unit: str, limits: Mapping[str, float], ends: tuple[str, str], low: float = 0.0
) -> str:
    def height(value: float) -> float:
        return 100 * (value - low) / (top - low)

    lines = "".join(
        f'<path stroke="var(--mark)" stroke-dasharray="6 4" stroke-width="1.5" '
        f'd="M0 {PLOT_HEIGHT * (1 - height(value) / 100):.1f}H{PLOT_WIDTH}"/>'
        for value in limits.values()
    )
    marks = "".join(
        f'<span class="mark" style="bottom:{height(value):.2f}%">{escape(name)}</span>'
        for name, value in limits.items()
    )
    labels = "".join(
        f'<span class="y" style="bottom:{share:.0f}%">{_short(low + (top - low) * share / 100)}</span>'
        for share in (0, 25, 50, 75, 100)
    )
    label = f"{escape(title, quote=True)}; the table below holds the figures"
    drawing = (
        f'viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" preserveAspectRatio="none" aria-hidden="true" focusable="false"'
    )
    return (
        f'<p>{escape(unit)}</p><div class="plot" role="img" aria-label="{label}"><svg {drawing}>{shapes}{lines}</svg>'
        f'{labels}{marks}<span class="x" style="left:0;transform:none">{escape(ends[0])}</span>'
        f'<span class="x" style="left:100%">{escape(ends[1])}</span></div>'
    )


def _outline(below: Sequence[float], above: Sequence[float], top: float) -> str:
    """Return the path of a band; each value holds until the next place."""
    wide = PLOT_WIDTH / len(above)

    def steps(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(wide * (n + end), PLOT_HEIGHT * (1 - value / top)) for n, value in enumerate(values) for end in (0, 1)]

    corners = [*steps(above), *reversed(steps(below))]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners) + "Z"


def _few(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most some `MAX_TABLE_ROWS` points, the last one among them."""
    step = max(1, len(points) // MAX_TABLE_ROWS)
    few = list(points[::step])
    return few if few[-1] == points[-1] else [*few, points[-1]]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
