"""A clock of the time in which this process runs: the hours in which a laptop sleeps, or the process is stopped, do not count."""

from __future__ import annotations

import threading
import time

BEAT_SECONDS = 5.0
"""How often a thread looks at the clock."""
LONGEST_BEAT_SECONDS = 30.0
"""Time between two looks from which on the process cannot have been running: no work keeps a thread waiting that long."""


class RunningClock:
    """Counts seconds, without those in which the process did not run. The system's date, and changes of it, do not matter.

    On Linux and macOS the monotonic clock stands still while a machine sleeps. On Windows it goes on, and so it does everywhere
    while a process is stopped (SIGSTOP).
    """

    def __init__(self) -> None:
        """Start to count."""
        self._lock = threading.Lock()
        self._seen, self._gaps = time.monotonic(), 0.0
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="running-clock", daemon=True).start()

    def seconds(self) -> float:
        """Return the seconds so far, from an arbitrary start: only differences have a meaning."""
        with self._lock:
            now = time.monotonic()
            if now - self._seen > LONGEST_BEAT_SECONDS:
                self._gaps += now - self._seen - BEAT_SECONDS
            self._seen = now
            return now - self._gaps

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.seconds()
