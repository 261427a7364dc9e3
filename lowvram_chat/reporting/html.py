"""Parts of a self-contained HTML page.

A page is one file that needs no network. It has a light and a dark scheme, fits a phone, and can be read by a screen reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from lowvram_chat import __version__

FILL_LEGEND = {
    "measured": "measured",
    "predicted": "predicted, not measured",
    "published": "published by others",
}
"""Kind of a metric -> meaning of its bar's fill."""
VERDICT_CLASSES = {"fits": "yes", "passed": "yes", "DOES NOT FIT": "no", "failed": "no", "out_of_memory": "no"}
"""Text of a table cell -> CSS class that colours it."""

# Scripts, fonts and requests are forbidden, so that the page cannot load anything.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a page. `sections` are pairs of heading and HTML; sections with empty HTML are left out."""
    sections = [(heading, body) for heading, body in sections if body]
    css = resources.files("lowvram_chat").joinpath("assets/report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{anchor(heading)}">{escape(heading)}</a>' for heading, _ in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the results</a>\n<header><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p><nav aria-label="Sections">{links}</nav></header>\n'
        f'<main id="main">\n{"".join(_section(heading, body) for heading, body in sections)}</main>\n'
        f"<footer><p>Made by lowvram_chat {__version__}.</p></footer>\n</body>\n</html>\n"
    )


def anchor(text: str) -> str:
    """Return the HTML id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. Columns of numbers are aligned to the right, and verdicts are coloured."""
    rows = [list(row) for row in rows]
    is_numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    header = _row("th", head, is_numeric)
    body = "".join(_row("td", row, is_numeric) for row in rows)
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead>{header}</thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str, *, is_open: bool = False) -> str:
    """Return HTML that is shown when its summary is clicked, or from the start if `is_open`."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}</details>"


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def fill_legend() -> str:
    """Return the legend of solid, hatched and outlined bars."""
    items = "".join(
        f'<li><i class="{kind}" aria-hidden="true"></i>{escape(text)}</li>' for kind, text in FILL_LEGEND.items()
    )
    return f'<ul class="key" aria-label="Meaning of the fills">{items}</ul>'


def _section(heading: str, body: str) -> str:
    name = anchor(heading)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(heading)}</h2>{body}</section>\n'


def _row(tag: str, values: Sequence[object], is_numeric: Sequence[bool]) -> str:
    cells = "".join(_cell(tag, value, numeric=numeric) for value, numeric in zip(values, is_numeric, strict=True))
    return f"<tr>{cells}</tr>"


def _cell(tag: str, value: object, *, numeric: bool) -> str:
    css_class = "n" if numeric else VERDICT_CLASSES.get(str(value))
    style = f' class="{css_class}"' if css_class else ""
    scope = ' scope="col"' if tag == "th" else ""
    return f"<{tag}{scope}{style}>{escape(str(value))}</{tag}>"


def _is_number(value: object) -> bool:
    """Return whether a cell holds a number, a percentage, a "-" for a missing value, or nothing."""
    return bool(re.fullmatch(r"[+-]?[\d,.]+(e[+-]?\d+)?( %)?|-|", str(value)))
