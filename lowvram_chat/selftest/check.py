"""A check of the self-test and its outcome."""

from __future__ import annotations

import re
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
    """What it means for a run: a clause that holds where the check is good, or, unless `is_claim`, why it is not."""
    figures: Mapping[str, Metric] = field(default_factory=dict)
    ran: bool = True
    """Whether the check could run on this device."""
    is_claim: bool = True


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
            outcome = Outcome(good=False, meaning=without_paths(str(error).rstrip(".")), is_claim=False)
        except Exception as error:  # a driver or a native library can raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            reason = without_paths(f"{type(error).__name__}: {first_line(error)} ({place})")
            outcome = Outcome(good=False, meaning=reason, is_claim=False)
        status: Literal["ok", "failed", "skipped"] = (
            "skipped" if not outcome.ran else "ok" if outcome.good else "failed"
        )
        claim = f"it is not so that {outcome.meaning}" if outcome.is_claim else outcome.meaning
        meaning = outcome.meaning if outcome.good else f"{claim}. {self.if_it_fails}"
        return CheckResult(
            name=self.name,
            title=self.title,
            status=status,
            meaning=meaning,
            figures=dict(outcome.figures),
            seconds=round(time.perf_counter() - started, 2),
        )


PATH = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/:'\"\s][^\\/:'\"\n]*[\\/])+")
"""The folders of an absolute path."""


def without_paths(text: str) -> str:
    """Return a text with the folders of its paths left out: they may hold a name, and the file is meant to be sent."""
    return PATH.sub(".../", text)


def figure(value: float, unit: str) -> Metric:
    """Return a measured figure, with four digits."""
    return Metric(value=float(f"{value:.4g}"), unit=unit, kind="measured")


def skipped(meaning: str) -> Outcome:
    """Return the outcome of a check that this device cannot run."""
    return Outcome(good=True, meaning=meaning, ran=False)
