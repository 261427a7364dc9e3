"""Words for what is wrong with a value, in the terms of a file and not of Python."""

from __future__ import annotations

import datetime
import json
import re
from decimal import Decimal

KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "true or false"),
    ((int, float, Decimal), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "an object"),
    (bytes, "bytes"),
    ((datetime.date, datetime.time), "a date or time"),
)


def kind_of(value: object) -> str:
    """Return what a value is in a data file: "null", "a number", "a list", "an object", ..."""
    return next((word for kind, word in KINDS if isinstance(value, kind)), "of an unknown kind")


JSON_PROBLEMS = {
    "Expecting value": "a value is missing",
    "Expecting property name enclosed in double quotes": "a key in double quotation marks is missing",
    "Expecting ',' delimiter": "a comma is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Unterminated string starting at": "a text is never closed; it begins",
    "Invalid control character at": "a line end or control character stands inside a text",
    "Extra data": "more text follows the end of the value",
    "Illegal trailing comma before end of object": "a comma stands before the end of an object",
    "Illegal trailing comma before end of array": "a comma stands before the end of a list",
    "Invalid \\escape": "a backslash is followed by a character that has no such escape",
    "Invalid \\uXXXX escape": "\\u is not followed by four hexadecimal digits",
}
"""Message of Python's JSON parser -> what is wrong."""


def json_problem(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a JSON text and where."""
    what = JSON_PROBLEMS.get(re.sub(r": .*", "", error.msg), error.msg)
    place = (
        f"column {error.colno}" if "\n" not in error.doc.rstrip("\n") else f"line {error.lineno}, column {error.colno}"
    )
    ends = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    cut_off = ", where the file or line may be cut off" if ends else ""
    return f"not JSON ({what} at {place}{cut_off})"


MAX_WIDTH = 400


def shorten(text: str) -> str:
    """Return a text of at most `MAX_WIDTH` characters, with an ellipsis in place of its middle."""
    half = MAX_WIDTH // 2
    return text if len(text) <= MAX_WIDTH else f"{text[:half]} ... {text[-half:]}"
