"""What is shown while a run goes on: the same quantities on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import time
from datetime import UTC, datetime, tzinfo
from typing import Any

import pytest
from rich.console import Console

from lowvram_chat.training import display as display_module
from lowvram_chat.training.display import Display
from lowvram_chat.units import MIB, format_duration

LINE: dict[str, Any] = {"step": 10, "loss": 4.5, "real_tokens_per_second": 9000.0, "peak_reserved_bytes": 2910 * MIB}


class Noon(datetime):
    """A clock that stands at noon."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Noon:
        return cls(2026, 11, 26, 12, 0, tzinfo=tz or UTC)


def test_a_log_line_tells_loss_speed_memory_and_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module, "datetime", Noon)
    logger = logging.getLogger("lowvram_chat")
    was, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.INFO, "lowvram_chat"):
            display = Display(3591 * MIB, Console(file=io.StringIO()))
            display.start(0, 40)
            display.started -= 100.0
            display.show(LINE)
            display.close()
    finally:
        logger.propagate = was
    (told,) = caplog.messages
    assert told == ("step 10 of 40: loss 4.5000, 9,000 tokens/s, 2,910 of 3,591 MiB, 5 m left, finishes at 12:05")


def test_a_terminal_shows_the_same_below_a_bar() -> None:
    screen = io.StringIO()
    display = Display(None, Console(file=screen, force_terminal=True, width=100))
    display.start(5, 40)
    display.advance(10)
    display.show(LINE)
    display.close()
    told = screen.getvalue()
    for words in ("10/40", "loss 4.5000", "9,000 tokens/s", "2,910 MiB", "left", "finishes at"):
        assert words in told


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (89.0, "89 s"), (91.0, "2 m"), (3599.0, "1 h 00 m"), (4800.0, "1 h 20 m")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(("hours", "words"), [(2, "at 14:00"), (15, "on Fri 27 Nov at 03:00")])
def test_the_finish_time_names_another_day(hours: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(display_module, "datetime", Noon)
    assert display_module._finish_time(3600 * hours) == words
