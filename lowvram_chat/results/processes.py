"""Runs a function in a new process, so that what it loads and allocates does not stay in this one."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from lowvram_chat.quiet import quiet_libraries

P = ParamSpec("P")
T = TypeVar("T")


def _prepare() -> None:
    """Leave Ctrl-C, which a terminal sends to both, to the parent process, and clean up when that ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    quiet_libraries()


def run_in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function returns when it is called in a new process, where libraries are quiet before they are imported.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
            raise
