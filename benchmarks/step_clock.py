"""A clock for optimizer steps that knows the machine's rate of matrix products around each of them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback

SIZE, PRODUCTS = 2048, 6
"""Of the matrices whose product is the rate, and how many products are timed at once."""


class Shares(TrainerCallback):
    """Takes each step's time and the rate of products around it."""

    def __init__(self, flops_per_step: float) -> None:
        self.flops_per_step = flops_per_step
        self.one, self.out = torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE)
        self.shares: list[float] = []
        self.rates: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.rate, self.started = self._rate(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.started
        rate = (self.rate + self._rate()) / 2
        self.shares.append(self.flops_per_step / seconds / rate)
        self.rates.append(rate)
        self.seconds.append(seconds)

    def _rate(self) -> float:
        times = []
        for _ in range(PRODUCTS):
            started = time.perf_counter()
            torch.mm(self.one, self.one, out=self.out)
            times.append(time.perf_counter() - started)
        return 2 * SIZE**3 / statistics.median(times)
