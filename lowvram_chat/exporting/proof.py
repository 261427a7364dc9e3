"""The proof that a merged model is the same function as its base and adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_LOGIT_DIFFERENCE = 1e-3
"""Largest absolute difference in fp32 logits at which two models count as the same function."""


@dataclass(frozen=True)
class Proof:
    """Largest absolute differences in fp32 logits on fixed random tokens."""

    adapter_to_merged: float
    adapter_to_reloaded: float
    adapter_to_base: float
    """How far the adapter moves the base: a proof about an adapter that does nothing would prove nothing."""

    def holds(self, *, exact: bool) -> bool:
        """Return whether the merged model is the same function as base and adapter.

        `exact`: the saved and reloaded model must be, too, since it was saved in float32.
        """
        same = self.adapter_to_merged <= MAX_LOGIT_DIFFERENCE  # False for NaN
        reloaded = self.adapter_to_reloaded <= MAX_LOGIT_DIFFERENCE or not exact
        return same and reloaded and math.isfinite(self.adapter_to_reloaded)
