"""A check of the self-test and its outcome."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lowvram_chat.errors import LowVramError
from lowvram_chat.model.out_of_memory import first_line
from lowvram_chat.results.record import CheckResult, Metric


@dataclass(frozen=True)
class Outcome:
    """What a check found. A check that cannot run on this device is not a failure."""

    good: bool
    meaning: str
    """What it means for a run, in a sentence."""
    figures: Mapping[str, Metric] = field(default_factory=dict)
    ran: bool = True
    """Whether the check could run on this device."""


@dataclass(frozen=True)
class Check:
    """One check: it takes the device and returns what it found, or raises."""

    name: str
    title: str
    work: Callable[[torch.device], Outcome]
    if_it_fails: str
    """What a failure means for a run, and what to do."""

    def run(self, device: torch.device) -> CheckResult:
        """Return the result of the check; an error of any kind is a failure."""
        started = time.perf_counter()
        try:
            outcome = self.work(device)
        except LowVramError as error:
            outcome = Outcome(good=False, meaning=str(error))
        except Exception as error:  # a driver or a native library can raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            outcome = Outcome(good=False, meaning=f"{type(error).__name__}: {first_line(error)} ({place})")
        status: Literal["ok", "failed", "skipped"] = (
            "skipped" if not outcome.ran else "ok" if outcome.good else "failed"
        )
        meaning = outcome.meaning if outcome.good else f"{outcome.meaning}. {self.if_it_fails}"
        return CheckResult(
            name=self.name,
            title=self.title,
            status=status,
            meaning=meaning,
            figures=dict(outcome.figures),
            seconds=round(time.perf_counter() - started, 2),
        )


def figure(value: float, unit: str) -> Metric:
    """Return a measured figure, with four digits."""
    return Metric(value=float(f"{value:.4g}"), unit=unit, kind="measured")


def skipped(meaning: str) -> Outcome:
    """Return the outcome of a check that this device cannot run."""
    return Outcome(good=True, meaning=meaning, ran=False)
