"""Runs a function in a new process, so that what it loads and allocates does not stay in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from lowvram_chat.quiet import quiet_libraries

P = ParamSpec("P")
T = TypeVar("T")


def run_in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function returns when it is called in a new process, where libraries are quiet before they are imported.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=quiet_libraries) as pool:
        return pool.submit(function, *args, **kwargs).result()
