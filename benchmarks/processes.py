"""Runs a command in its own process and returns its output, its duration and its peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from lowvram_chat.training.process_memory import high_water_bytes

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Done:
    """A command that succeeded."""

    stdout: str
    wall_seconds: float
    peak_resident_mib: float


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **(environment or {})})
        try:
            status, peak = _wait(process)
        except BaseException:  # Ctrl-C too
            process.kill()
            raise
        stdout.seek(0)
        stderr.seek(0)
        if status:
            end = (stdout.read() + stderr.read()).decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command[:4])} failed:\n{end}")
        return Done(stdout.read().decode(errors="replace"), time.monotonic() - started, peak / 2**20)


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process and return its exit status and its peak resident memory in bytes."""
    if high_water_bytes() is not None:
        peak = 0
        while process.poll() is None:
            peak = high_water_bytes(process.pid) or peak  # None of a process that has just ended
            time.sleep(POLL_SECONDS)
        return process.returncode, peak
    if sys.platform != "win32":
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    launcher, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            # A virtual environment's python.exe only starts the real interpreter.
            peak = max(
                peak, *(member.memory_info().peak_wset for member in (launcher, *launcher.children(recursive=True)))
            )
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL_SECONDS)
    return process.wait(), peak
