"""The published run that everything here is compared with. Source: its training notebook."""

from __future__ import annotations

BASELINE_TOKENS = 256_032 * 128
"""Of one epoch, padding included: rows of `train_gen` times `max_length`."""
BASELINE_SECONDS = 26_819.8
"""Of three epochs."""
BASELINE_TOKENS_PER_SECOND = 3 * BASELINE_TOKENS / BASELINE_SECONDS
