"""Commands as processes that a test can signal, kill and wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.samples import ROOT

SECONDS = 120
"""Longest wait for what a test waits for."""


def start(words: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m lowvram_chat.<words>` in a folder, offline, on one thread; its output goes to one pipe."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", f"lowvram_chat.{words[0]}", *words[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=variables,
        preexec_fn=_answer_signals if os.name == "posix" else None,  # no threads hold locks that it needs
    )


def _answer_signals() -> None:
    """Take back that signals are ignored: a shell starts background jobs so, nohup too, and every child inherits it."""
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def finished(words: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """Run a command to its end and return its exit code and output."""
    process = start(words, folder, **environment)
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def refused(words: list[str], capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]) -> str:
    """Run a command in this process and return its message.

    Raises:
        AssertionError: it does not end with exit code 2, or prints a traceback.
    """
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something holds, while a process runs.

    Raises:
        AssertionError: the process ended before, or it took too long.
    """
    end = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def steps_of(run: Path) -> int:
    """Return how many lines metrics.jsonl has: the logged steps."""
    file = run / "metrics.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0
