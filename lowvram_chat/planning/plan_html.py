"""A plan as HTML for notebooks: verdict, stacked bar, table. Styles are inline, since a notebook has no style sheet."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from lowvram_chat.units import format_mib

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999", "#44aa99", "#882255")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and two more."""


def plan_html(verdict: str, *, fits: bool, categories: Mapping[str, int], limit_bytes: int) -> str:
    """Return a plan as HTML: `categories` in bytes at the peak, and a black line in the bar at `limit_bytes`."""
    parts = sorted(((size, name) for name, size in categories.items() if size > 0), reverse=True)
    total = sum(size for size, _ in parts)
    coloured = list(zip(parts, COLOURS, strict=False))
    rows = "".join(
        f'<tr><td style="text-align:left"><span style="color:{colour}">&#9632;</span> {escape(name)}</td>'
        f"<td>{format_mib(size)}</td><td>{size / total:.0%}</td></tr>"
        for (size, name), colour in coloured
    )
    lines = "<br>".join(escape(line) for line in verdict.splitlines())
    return (
        f'<div><p><b style="color:{"#00704f" if fits else "#b3261e"}">{lines}</b></p>'
        f"{_stacked_bar(coloured, max(total, limit_bytes), limit_bytes)}"
        f'<table><thead><tr><th style="text-align:left">predicted, at the peak</th><th>MiB</th><th>share</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _stacked_bar(parts: list[tuple[tuple[int, str], str]], width_bytes: int, limit_bytes: int) -> str:
    """Return a bar of ((bytes, category), colour) parts that is `width_bytes` wide, with a line at the limit."""
    bar = "".join(
        f'<span title="{escape(name)}: {format_mib(size)} MiB" style="display:inline-block;height:100%;'
        f'width:{100 * size / width_bytes:.2f}%;background:{colour}"></span>'
        for (size, name), colour in parts
    )
    return (
        '<div style="position:relative;width:100%;max-width:40em;height:1.4em;background:#eee;white-space:nowrap">'
        f'{bar}<span title="usable: {format_mib(limit_bytes)} MiB" style="position:absolute;top:-3px;bottom:-3px;'
        f'left:calc({100 * limit_bytes / width_bytes:.2f}% - 2px);border-left:2px solid black"></span></div>'
    )
