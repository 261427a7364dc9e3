"""Text as a terminal may show it: what comes out of files, models and names can hold escape sequences."""

from __future__ import annotations

import logging
import re

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that reverse the order of text, and halves of surrogate pairs."""


def printable(text: str) -> str:
    """Return a text with control characters written as escapes: `\\x1b` instead of the character."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return printable(super().format(record))
