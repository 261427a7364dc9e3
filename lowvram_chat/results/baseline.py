"""The published baseline that benchmarks compare with: GPT-2 small on an RTX 3050 Laptop in 7 h 27 m.

Source: its public training notebook, as decoded in docs/benchmarks.md.
"""

from __future__ import annotations

BASELINE_TOKENS = 256_032 * 128
"""Tokens of one epoch, padding included: rows of `train_gen` times `max_length`."""
BASELINE_SECONDS = 26_819.8
"""Time of three epochs."""
BASELINE_TOKENS_PER_SECOND = 3 * BASELINE_TOKENS / BASELINE_SECONDS


def seconds_per_epoch(tokens_per_second: float) -> float:
    """Return the time for one epoch of the baseline's work at another speed."""
    return BASELINE_TOKENS / tokens_per_second
