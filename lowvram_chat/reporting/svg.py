"""Draws the plots of charts: shapes as SVG, labels as HTML, so that they stay legible on a narrow screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PLOT_WIDTH, PLOT_HEIGHT = 1000, 300
"""Size of a plot in its own coordinates. The page stretches it to the available width."""
HATCH_PATTERN = (
    '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path d="M0 0V7" stroke="#fff" stroke-opacity=".55" stroke-width="2.5"/></pattern></defs>'
)

Point = tuple[float, float]
"""(x, y)"""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The vertical range of a plot, the labels of its ends, and the limits to mark."""

    low: float = 0.0
    high: float
    unit: str
    ends: tuple[str, str]
    limits: Mapping[str, float]

    def share(self, value: float) -> float:
        """Return the height of a value: 0 at the bottom of the plot, 1 at the top. In an empty range it is 0."""
        span = self.high - self.low
        return (value - self.low) / span if span else 0.0

    def at(self, share: float) -> float:
        """Return the value at a height."""
        return self.low + (self.high - self.low) * share


def plot(title: str, shapes: str, axes: Axes) -> str:
    """Return a plot with its shapes, the lines of its limits, and the labels of its axes."""
    label = f"{escape(title, quote=True)}; the table below holds the values"
    svg = f'viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" preserveAspectRatio="none" aria-hidden="true" focusable="false"'
    return (
        f'<p>{escape(axes.unit)}</p><div class="plot" role="img" aria-label="{label}">'
        f"<svg {svg}>{shapes}{_limit_lines(axes)}</svg>{_axis_labels(axes)}</div>"
    )


def band_path(below: Sequence[float], above: Sequence[float], top: float) -> str:
    """Return the SVG path of the band between two step functions."""
    width = PLOT_WIDTH / len(above)

    def corners(values: Sequence[float]) -> list[Point]:
        return [
            (width * (position + end), PLOT_HEIGHT * (1 - value / top))
            for position, value in enumerate(values)
            for end in (0, 1)
        ]

    outline = [*corners(above), *reversed(corners(below))]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in outline) + "Z"


def line(points: Sequence[Point], colour: str, axes: Axes, first: float, last: float) -> str:
    """Return the SVG path of a line; a single point is drawn as a dot."""
    width = (last - first) or 1.0
    shares = [((x - first) / width, axes.share(y)) for x, y in points]
    path = "L".join(f"{PLOT_WIDTH * x:.1f} {PLOT_HEIGHT * (1 - y):.1f}" for x, y in shares)
    is_dot = len(points) == 1
    path += "h.01" if is_dot else ""
    stroke = f'stroke="{colour}" stroke-width="{6 if is_dot else 2}" stroke-linecap="round"'
    return f'<path fill="none" {stroke} d="M{path}"/>'


def _limit_lines(axes: Axes) -> str:
    return "".join(
        f'<path stroke="var(--mark)" stroke-dasharray="6 4" stroke-width="1.5" '
        f'd="M0 {PLOT_HEIGHT * (1 - axes.share(value)):.1f}H{PLOT_WIDTH}"/>'
        for value in axes.limits.values()
    )


def _axis_labels(axes: Axes) -> str:
    y_labels = "".join(
        f'<span class="y" style="bottom:{percent:.0f}%">{_tick_text(axes.at(percent / 100))}</span>'
        for percent in (0, 25, 50, 75, 100)
    )
    limit_labels = "".join(
        f'<span class="mark" style="bottom:{100 * axes.share(value):.2f}%">{escape(name)}</span>'
        for name, value in axes.limits.items()
    )
    first, last = axes.ends
    return (
        f'{y_labels}{limit_labels}<span class="x" style="left:0;transform:none">{escape(first)}</span>'
        f'<span class="x" style="left:100%">{escape(last)}</span>'
    )


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
