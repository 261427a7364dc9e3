"""All errors that a user can cause, in one tree; the command line prints them without a traceback.

    LowVramError
    +-- UsageError (ValueError)             an argument on the command line is wrong
    +-- RecipeError (ValueError)            a recipe has one or more problems
    +-- DataError (ValueError)              data cannot be used
    +-- NotFoundError (FileNotFoundError)   a file, model, dataset or run does not exist
    +-- ModelError (RuntimeError)           a model or adapter does not support the request
    +-- DeviceError (RuntimeError)          this machine does not support the request
    +-- StorageError (OSError)              a disk is full, read-only or fails
    +-- OutOfMemory (MemoryError)           the device ran out of memory
    +-- DoesNotFit (MemoryError)            a run is predicted not to fit its graphics card
    +-- DivergedError (ArithmeticError)     the weights of a run became NaN or infinite
    +-- ProofError (ArithmeticError)        a merged model differs from base + adapter

A message has the form `<where>: <what is wrong>. <what to do>.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LowVramError(Exception):
    """Base of all errors that a user can act on. The command line exits with 2, or with 1 for the negative
    results `ProofError`, `DoesNotFit` and `DivergedError`."""


class UsageError(LowVramError, ValueError):
    """An argument on the command line is wrong."""


class RecipeError(LowVramError, ValueError):
    """A recipe has one or more problems; the message lists all of them."""


class DataError(LowVramError, ValueError):
    """Data cannot be used for training or evaluation."""


class NotFoundError(LowVramError, FileNotFoundError):
    """A file, model, dataset or run does not exist or cannot be reached."""


class ModelError(LowVramError, RuntimeError):
    """A model or adapter does not support the request."""


class DeviceError(LowVramError, RuntimeError):
    """The hardware or the libraries of this machine do not support the request."""


class StorageError(LowVramError, OSError):
    """A file or folder cannot be read or written: the disk is full, read-only or fails."""


class SubstitutionError(DeviceError):
    """A faster way to compute a loss or a gradient is not exact on this model and device.

    `settings` name the settings to switch off.
    """

    def __init__(
        self,
        message: str,
        settings: Sequence[str] = ("model.fused_loss", "adapter.fused", "model.document_attention"),
    ) -> None:
        """Keep the settings."""
        super().__init__(message)
        self.settings = tuple(settings)


class CompilationError(DeviceError):
    """torch.compile fails on this machine, although what it needs is installed."""


class OutOfMemory(LowVramError, MemoryError):
    """The device ran out of memory; the message says which settings would fit."""


class DivergedError(LowVramError, ArithmeticError):
    """The weights of a run became NaN or infinite; its checkpoints are as they were."""


class DoesNotFit(LowVramError, MemoryError):
    """A run is predicted not to fit its graphics card; the message says which settings would fit."""


class ProofError(LowVramError, ArithmeticError):
    """The logits of a merged model differ from those of base + adapter."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with the most similar known word, or an empty string if none is similar."""
    similar = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{similar[0]}'?" if similar else ""
