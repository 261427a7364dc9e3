"""Recognises a device that is out of memory, notes what it was doing, and turns the error into advice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lowvram_chat.errors import LowVramError, OutOfMemory

MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "can't allocate memory",
)
"""Parts of the messages of RuntimeErrors that the driver, cuBLAS and the CPU's allocator raise besides OutOfMemoryError."""

PHASE_ATTRIBUTE = "lowvram_chat_phase"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device, or on a CPU the machine, ran out of memory.

    An error of this package does not: it is advice already, and some are MemoryErrors.
    """
    if isinstance(error, LowVramError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError):
        return any(message in str(error) for message in MESSAGES)
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Note on an out-of-memory error in which phase of a run it happened. The innermost phase counts."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not hasattr(error, PHASE_ATTRIBUTE):
            setattr(error, PHASE_ATTRIBUTE, name)
        raise


def phase_of(error: BaseException) -> str:
    """Return the phase in which an out-of-memory error happened; "training" if none was noted."""
    return str(getattr(error, PHASE_ATTRIBUTE, "training"))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def advised(what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into `OutOfMemory` with advice; `what` begins the message.

    Raises:
        OutOfMemory: the device ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what}: out of memory ({first_line(error)}). {advice}") from None
