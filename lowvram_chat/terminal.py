"""Text as a terminal or a pipe can take it: without the escape sequences of files and models, in an encoding that has it all."""

from __future__ import annotations

import io
import logging
import re
import sys

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


def use_utf8() -> None:
    """Make stdout and stderr take every character, whatever the encoding of the system.

    A pipe or a file gets UTF-8. A terminal keeps its encoding, and shows `?` for what it does not have. Windows gives a pipe the
    encoding of its code page, such as cp1252, in which most of the world's characters are an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's stream
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def read_utf8() -> None:
    """Make stdin read UTF-8, with or without a byte-order mark, where it is a pipe or a file."""
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")
