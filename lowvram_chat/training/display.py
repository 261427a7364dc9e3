"""Shows the progress of a run: a live bar on a terminal, log lines elsewhere, with the same figures in both."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lowvram_chat.units import format_duration, format_mib

log = logging.getLogger(__name__)

MEMORY_KEYS = ("peak_reserved_bytes", "peak_resident_bytes")
"""Memory figures of a logged line that are shown: the card's on CUDA, else the process's."""
LOSS_TITLES = {"loss": "loss", "eval_loss": "held-out loss"}


class Display:
    """Shows loss, tokens per second (padding excluded), memory against its limit, time left and finish time."""

    def __init__(
        self,
        limit_bytes: int | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a display; `limit_bytes` is what the allocator may reserve, None if there is no limit. `clock` gives seconds."""
        self.clock = clock
        self.limit_bytes = limit_bytes
        self.console = console or Console(stderr=True)
        self.progress = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), console=self.console)
        self.text = Text()
        self.live: Live | None = None
        self.task = TaskID(0)
        self.started, self.first_step, self.total_steps = clock(), 0, 0

    def start(self, done: int, total: int) -> None:
        """Start to show a run of `total` optimizer steps, `done` of which an earlier process took."""
        self.started, self.first_step, self.total_steps = self.clock(), done, total
        if self.console.is_terminal:
            self.task = self.progress.add_task("", total=total, completed=done)
            self.live = Live(Group(self.progress, self.text), console=self.console, refresh_per_second=4)
            self.live.start()

    def advance(self, step: int) -> None:
        """Move the bar to an optimizer step."""
        if self.live is not None:
            self.progress.update(self.task, completed=step)

    def show(self, line: Mapping[str, float]) -> None:
        """Show a logged step, which is a line of metrics.jsonl."""
        text = ", ".join(self._figures(line))
        if self.live is not None:
            self.text.plain = text
        else:
            log.info("step %d of %d: %s", line["step"], self.total_steps, text)

    def close(self) -> None:
        """Stop the live display and leave its last state on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _figures(self, line: Mapping[str, float]) -> list[str]:
        figures = [f"{title} {line[key]:.4f}" for key, title in LOSS_TITLES.items() if key in line]
        rate = line.get("real_tokens_per_second")
        if rate is None:
            return figures
        figures.append(f"{rate:,.0f} tokens/s")
        figures += [self._memory(line[name]) for name in MEMORY_KEYS if name in line]
        done = line["step"] - self.first_step
        if done > 0 and line["step"] < self.total_steps:
            left = (self.clock() - self.started) / done * (self.total_steps - line["step"])
            figures.append(f"{format_duration(left)} left, finishes {_finish_time(left)}")
        return figures

    def _memory(self, nbytes: float) -> str:
        limit = "" if self.limit_bytes is None else f" of {format_mib(self.limit_bytes)}"
        return f"{format_mib(nbytes)}{limit} MiB"


def _finish_time(seconds_left: float) -> str:
    """Return when the run finishes by the local clock: "at 14:32", or "on Fri 27 Nov at 03:10" if not today."""
    now = datetime.now().astimezone()
    finish = now + timedelta(seconds=seconds_left)
    day = "" if finish.date() == now.date() else f"{finish:on %a %d %b }"
    return f"{day}at {finish:%H:%M}"
