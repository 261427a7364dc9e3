"""What is shown while a run goes on: the same quantities on a terminal and in a log."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from lowvram_chat.training.display import Display, format_duration
from lowvram_chat.units import MIB

LINE: dict[str, Any] = {"step": 10, "loss": 4.5, "real_tokens_per_second": 9000.0, "peak_reserved_bytes": 2910 * MIB}


def test_a_log_line_tells_loss_speed_memory_and_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
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
    assert told == (
        "step 10 of 40: loss 4.5000, 9,000 tokens/s, 2,910 of 3,591 MiB, 5 m left, a baseline epoch 1 h 01 m"
    )


def test_a_terminal_shows_the_same_below_a_bar() -> None:
    screen = io.StringIO()
    display = Display(None, Console(file=screen, force_terminal=True, width=100))
    display.start(5, 40)
    display.advance(10)
    display.show(LINE)
    display.close()
    told = screen.getvalue()
    for words in ("10/40", "loss 4.5000", "9,000 tokens/s", "2,910 MiB", "left", "a baseline epoch"):
        assert words in told


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (89.0, "89 s"), (91.0, "2 m"), (3599.0, "1 h 00 m"), (4800.0, "1 h 20 m")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
