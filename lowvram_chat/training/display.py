"""Where a run is, while it goes on: a live bar on a terminal, plain log lines elsewhere; the same quantities in both."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lowvram_chat.recipe.baseline import BASELINE_TOKENS
from lowvram_chat.units import MIB

log = logging.getLogger(__name__)

MEMORY_KEYS = ("peak_reserved_bytes", "peak_resident_bytes")
"""What a logged line tells of the memory: the card's where there is one."""


class Display:
    """Shows loss, real tokens a second, memory against the limit, and the time left for this run and a baseline epoch."""

    def __init__(self, limit_bytes: int | None = None, console: Console | None = None) -> None:
        """`limit_bytes`: what the allocator may take of the card; None where there is no limit."""
        self.limit_bytes = limit_bytes
        self.console = console or Console(stderr=True)
        self.progress = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), console=self.console)
        self.words = Text()
        self.live: Live | None = None
        self.task = TaskID(0)
        self.started, self.first, self.total = time.monotonic(), 0, 0

    def start(self, done: int, total: int) -> None:
        """Begin to show a run of `total` optimizer steps, `done` of which were done before."""
        self.started, self.first, self.total = time.monotonic(), done, total
        if self.console.is_terminal:
            self.task = self.progress.add_task("", total=total, completed=done)
            self.live = Live(Group(self.progress, self.words), console=self.console, refresh_per_second=4)
            self.live.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.live is not None:
            self.progress.update(self.task, completed=step)

    def show(self, line: dict[str, Any]) -> None:
        """Tell a logged step, a line of metrics.jsonl."""
        text = ", ".join(self._words(line))
        if self.live is not None:
            self.words.plain = text
        else:
            log.info("step %d of %d: %s", line["step"], self.total, text)

    def close(self) -> None:
        """Leave the display as it stands."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _words(self, line: dict[str, Any]) -> list[str]:
        named = {"loss": "loss", "eval_loss": "held-out loss"}
        words = [f"{name} {line[key]:.4f}" for key, name in named.items() if key in line]
        rate = line.get("real_tokens_per_second")
        if rate is None:
            return words
        words.append(f"{rate:,.0f} tokens/s")
        words += [self._memory(line[name]) for name in MEMORY_KEYS if name in line]
        done = line["step"] - self.first
        if done > 0 and line["step"] < self.total:
            left = (time.monotonic() - self.started) / done * (self.total - line["step"])
            words.append(f"{format_duration(left)} left")
        if rate:
            words.append(f"a baseline epoch {format_duration(BASELINE_TOKENS / rate)}")
        return words

    def _memory(self, nbytes: int) -> str:
        limit = "" if self.limit_bytes is None else f" of {self.limit_bytes / MIB:,.0f}"
        return f"{nbytes / MIB:,.0f}{limit} MiB"


def format_duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 m", "1 h 20 m"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} m" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"
