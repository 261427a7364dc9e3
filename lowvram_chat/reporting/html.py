"""Pieces of a page that stands alone: one file, no network, light and dark, readable on a phone and by a screen reader."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from lowvram_chat import __version__

FILL_LEGEND = {
    "measured": "measured",
    "predicted": "predicted, measured by nobody",
    "published": "published by others",
}
"""What a bar's fill says, everywhere."""

# No script, no font, no picture from anywhere: the page may not even try.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a page; `sections` are (heading, HTML), and those without HTML are left out."""
    shown = [(heading, body) for heading, body in sections if body]
    css = resources.files("lowvram_chat").joinpath("assets/report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{anchor(heading)}">{escape(heading)}</a>' for heading, _ in shown)
    bodies = "".join(
        f'<section aria-labelledby="{anchor(heading)}"><h2 id="{anchor(heading)}">{escape(heading)}</h2>{body}</section>\n'
        for heading, body in shown
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the results</a>\n<header><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p><nav aria-label="Sections">{links}</nav></header>\n'
        f'<main id="main">\n{bodies}</main>\n<footer><p>Made by lowvram_chat {__version__}.</p></footer>\n</body>\n</html>\n'
    )


def anchor(text: str) -> str:
    """Return a heading's id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; figures stand on the right, "fits" and "DOES NOT FIT" in colour and in words."""
    rows = [list(row) for row in rows]
    is_figure = [bool(rows) and all(_is_figure(row[column]) for row in rows) for column in range(len(head))]

    def cell(tag: str, column: int, value: object) -> str:
        verdict = {"fits": "yes", "passed": "yes", "DOES NOT FIT": "no", "failed": "no", "out_of_memory": "no"}.get(
            str(value)
        )
        style = f' class="{"n" if is_figure[column] else verdict}"' if is_figure[column] or verdict else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{style}>{escape(str(value))}</{tag}>"

    top = "".join(cell("th", column, name) for column, name in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', column, value) for column, value in enumerate(row))}</tr>" for row in rows)
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_figure(value: object) -> bool:
    return bool(re.fullmatch(r"[+-]?[\d,.]+(e[+-]?\d+)?( %)?|-|", str(value)))


def folded(summary: str, body: str, *, is_open: bool = False) -> str:
    """Return what is shown at a click."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}</details>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def fill_legend() -> str:
    """Return what solid, hatched and outlined mean."""
    items = "".join(
        f'<li><i class="{kind}" aria-hidden="true"></i>{escape(text)}</li>' for kind, text in FILL_LEGEND.items()
    )
    return f'<ul class="key" aria-label="What the fills mean">{items}</ul>'
