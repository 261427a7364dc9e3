"""Signals that end a process: at once, or, while a run trains, after the present step and a checkpoint.

with signals_answered():        # Ctrl-C, SIGTERM, SIGHUP and Ctrl-Break raise `Stopped`
    with deferred():            # the first one waits; the second raises
        while not requested(): ...
    raise_if_requested()
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
CONSOLE_CLOSES = (2, 5, 6)
"""Windows' events of a console that closes, a user who logs off, and a shutdown. Source: wincon.h, CTRL_CLOSE_EVENT."""
CLOSING_SECONDS = 20.0
"""Longest wait in which a run may end after such an event. Windows ends the process when the handler returns, or by itself."""


RAISED_AGAIN_AFTER = 0.05
"""Seconds after which a signal is sent again: the finaliser in which it came has ended."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work."""

    def __init__(self, number: int) -> None:
        """Keep the signal."""
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + (
            number if number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) else signal.SIGINT
        )


class _State:
    """What the signals of this process are to do."""

    requested: int | None = None
    deferring: bool = False


_state = _State()


@contextlib.contextmanager
def signals_answered() -> Iterator[None]:
    """Raise `Stopped` in the main thread when a signal asks this process to end. Signals that are ignored stay so (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, _answer) for number in wanted}
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again(sys.unraisablehook)
    ended = threading.Event()
    closing = _answer_closing_console(ended)
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        closing()
        _state.requested = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the first signal wait, so that the work can end in good order; `requested` says whether there was one.

    Processes that train together would not end in the same step, so that theirs does not wait.

    Raises:
        Stopped: a signal came before, and a library swallowed the exception.
    """
    raise_if_requested()
    _state.deferring = int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        yield
    finally:
        _state.deferring = False


def requested() -> bool:
    """Return whether a signal waits."""
    return _state.requested is not None


def raise_if_requested() -> None:
    """End the work now, if a signal waits.

    Raises:
        Stopped: it does.
    """
    number, _state.requested = _state.requested, None
    if number is not None:
        raise Stopped(number)


def raise_other_signals(error: BaseException) -> None:
    """Raise an error again if it stands for a signal that is not Ctrl-C, for code that answers Ctrl-C itself.

    Raises:
        Stopped: the error.
    """
    if isinstance(error, Stopped) and error.number != signal.SIGINT:
        raise error


def _raise_again(hook: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], object]:
    """Return a hook for exceptions that Python cannot raise: where a signal came in a finaliser, it is sent again."""

    def unraisable(found: sys.UnraisableHookArgs) -> object:
        if not isinstance(found.exc_value, Stopped):
            return hook(found)
        threading.Timer(RAISED_AGAIN_AFTER, signal.raise_signal, [found.exc_value.number]).start()
        return None

    return unraisable


def _answer(number: int, frame: FrameType | None = None) -> None:
    is_second = _state.requested is not None
    _state.requested = number  # kept in any case: a library may swallow the exception
    if is_second or not _state.deferring:
        raise Stopped(number)
    log.warning("stopping after this step, with a checkpoint; a second signal stops at once")


if sys.platform == "win32":

    def _answer_closing_console(ended: threading.Event) -> Callable[[], None]:
        """Let a run that trains write a checkpoint when its console closes; return what undoes this."""
        import ctypes

        @ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)
        def handler(event: int) -> int:
            if event not in CONSOLE_CLOSES or not _state.deferring:
                return 0
            _state.requested = signal.SIGTERM
            ended.wait(CLOSING_SECONDS)
            return 1

        set_handler = ctypes.windll.kernel32.SetConsoleCtrlHandler
        set_handler(handler, 1)
        return lambda: set_handler(handler, 0)

else:

    def _answer_closing_console(ended: threading.Event) -> Callable[[], None]:
        """Do nothing: elsewhere a terminal that closes sends SIGHUP."""
        return lambda: None
