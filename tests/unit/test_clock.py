"""The clock of a run leaves out the time in which its process does not run."""

from __future__ import annotations

import time

import pytest

from lowvram_chat.training.clock import BEAT_SECONDS, RunningClock


def test_an_hour_of_sleep_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = RunningClock()
    clock.close()
    started = clock.seconds()
    now += 10
    assert clock.seconds() - started == 10
    now += 3600
    assert clock.seconds() - started == 10 + BEAT_SECONDS
    now += 20
    assert clock.seconds() - started == 30 + BEAT_SECONDS


def test_the_date_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = RunningClock()
    clock.close()
    started = clock.seconds()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock.seconds() - started < 60
