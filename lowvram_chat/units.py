"""Bytes, seconds and counts as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

MIB = 1024 * 1024


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number, 0 of none; NaN if any is NaN, which `max` may pass over."""
    return max(numbers, key=lambda number: (math.isnan(number), number), default=0.0)


def format_mib(nbytes: float) -> str:
    """Return bytes in MiB, without the unit: "3,891"."""
    return f"{nbytes / MIB:,.0f}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an "s" in the plural: "1 step", "1,200 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 m", "1 h 20 m"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} m" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def format_hours(hours: float) -> str:
    """Return a time in hours and minutes: "2 h 59 m"."""
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60:02d} m"
