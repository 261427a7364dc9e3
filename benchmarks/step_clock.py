"""A trainer callback that times optimizer steps and measures the machine's matrix-product rate around each of them."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MATRIX_SIZE, TIMED_PRODUCTS = 2048, 6
"""Width of the square matrices whose product is timed, and how many products are timed for one rate."""


class ShareClock(TrainerCallback):
    """Times each step and computes the share of the matrix-product rate that it reaches."""

    def __init__(self, flops_per_step: float) -> None:
        self.flops_per_step = flops_per_step
        self.matrix, self.product = torch.randn(MATRIX_SIZE, MATRIX_SIZE), torch.empty(MATRIX_SIZE, MATRIX_SIZE)
        self.shares: list[float] = []
        """Of each step; the lists below too."""
        self.rates: list[float] = []
        """FLOP/s."""
        self.seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Measure the rate and start the clock."""
        self.rate, self.started = self._rate(), time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop the clock, measure the rate again, and add the step's figures."""
        seconds = time.perf_counter() - self.started
        rate = (self.rate + self._rate()) / 2
        self.shares.append(self.flops_per_step / seconds / rate)
        self.rates.append(rate)
        self.seconds.append(seconds)

    def _rate(self) -> float:
        """Return the machine's matrix-product rate, FLOP/s."""
        seconds = []
        for _ in range(TIMED_PRODUCTS):
            started = time.perf_counter()
            torch.mm(self.matrix, self.matrix, out=self.product)
            seconds.append(time.perf_counter() - started)
        return 2 * MATRIX_SIZE**3 / statistics.median(seconds)
