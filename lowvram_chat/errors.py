"""Every error that a user can cause, in one tree; the command line prints these without a traceback.

    LowVramError
    +-- UsageError (ValueError)             a word on the command line is wrong
    +-- RecipeError (ValueError)            the recipe is wrong: every problem at once
    +-- DataError (ValueError)              rows that cannot be used
    +-- NotFoundError (FileNotFoundError)   a file, model, dataset or run that is not there
    +-- ModelError (RuntimeError)           a model or adapter that cannot do what is asked
    +-- DeviceError (RuntimeError)          this machine cannot do what is asked
    +-- OutOfMemory (MemoryError)           the device ran out of memory
    +-- DoesNotFit (MemoryError)            a run that is planned not to fit its card
    +-- ProofError (ArithmeticError)        a merge that is not the same function

A message reads `<where>: <what is wrong>. <what to do>.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowVramError(Exception):
    """Base of all errors that the user can act on; the command line exits with 2 (1 for `ProofError` and `DoesNotFit`)."""


class UsageError(LowVramError, ValueError):
    """A command-line word that is not understood."""


class RecipeError(LowVramError, ValueError):
    """A recipe with one or more problems; the message lists them all."""


class DataError(LowVramError, ValueError):
    """Data that cannot be trained on."""


class NotFoundError(LowVramError, FileNotFoundError):
    """A file, model, dataset or run that does not exist or cannot be reached."""


class ModelError(LowVramError, RuntimeError):
    """A model or adapter that cannot do what is asked."""


class DeviceError(LowVramError, RuntimeError):
    """A request that this machine's hardware or libraries cannot serve."""


class OutOfMemory(LowVramError, MemoryError):
    """The device ran out of memory; the message says what would fit."""


class DoesNotFit(LowVramError, MemoryError):
    """A run that is planned not to fit its card; the message says what would."""


class ProofError(LowVramError, ArithmeticError):
    """A merged model whose logits differ from base + adapter."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
