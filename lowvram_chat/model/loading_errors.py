"""Turns what transformers raises when a model is loaded or built into our errors, with one readable sentence."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lowvram_chat.errors import LowVramError, ModelError, NotFoundError
from lowvram_chat.hub import explain

log = logging.getLogger(__name__)

Built = TypeVar("Built")

LOADING_ERRORS = (
    *(RuntimeError, SafetensorError, ValueError, LookupError, ImportError),
    *(
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        StrictDataclassError,
    ),  # settings of a wrong type or size
)

PICKLED = "Pickled weights (.bin) can run code, so they are not loaded. Convert them to safetensors first."

LOADING = threading.RLock()
"""Held while a model loads: transformers patches torch meanwhile, and two threads that load at once break each other."""


class UnsupportedAttention(ModelError):
    """A model has no attention of the kind that a recipe asks for."""


def with_supported_attention(build: Callable[[str], Built], attention: str, name: str) -> Built:
    """Return what `build` makes with this attention, or with eager attention where the model has no SDPA.

    Raises:
        UnsupportedAttention: the model has no attention of another kind.
    """
    try:
        return build(attention)
    except UnsupportedAttention:
        if attention != "sdpa":
            raise
    log.info("model.attention: %s has no sdpa attention in transformers, so eager attention is used", name)
    return build("eager")


@contextlib.contextmanager
def errors_explained(name: str, path: str, loader: str, *, attention: str = "") -> Iterator[None]:
    """Turn errors of transformers' `loader`.from_pretrained(`path`) into errors with one readable sentence.

    Raises:
        NotFoundError, ModelError: as `load_model`.
    """
    try:
        with LOADING:
            yield
    except (torch.OutOfMemoryError, LowVramError):
        raise
    except pickle.UnpicklingError:  # an index of the hub that names a pickle, which torch reads as tensors only
        raise ModelError(f"{name}: {PICKLED}") from None
    except OSError as error:
        raise _file_error(error, name, path) from None
    except LOADING_ERRORS as error:
        raise _load_error(error, name, loader, attention) from None


def _file_error(error: OSError, name: str, path: str) -> LowVramError:
    """Return our error for a missing or unreadable file."""
    if not Path(path).is_dir():
        return NotFoundError(explain("model", name, error))
    if "safetensors" in str(error):
        return ModelError(f"{name}: this folder has no model.safetensors. {PICKLED}")
    return NotFoundError(f"{name}: a file is missing in this folder ({_first_line(error)}). Save the model again.")


def _load_error(error: Exception, name: str, loader: str, attention: str) -> ModelError:
    """Return our error for a model that is present but cannot be loaded."""
    if isinstance(error, RuntimeError):
        reason = "their shapes differ" if "mismatched" in str(error) else _first_line(error)
        return ModelError(
            f"{name}: the weights do not match config.json ({reason}). Download the model again, or save it again."
        )
    if isinstance(error, SafetensorError):
        return ModelError(f"{name}: the weights are damaged ({error}). Download the model again, or save it again.")
    if "does not support an attention implementation" in str(error):
        return UnsupportedAttention(
            f"{name}: transformers has no {attention} attention for it. Set model.attention=eager."
        )
    if "/" in attention:  # a kernel of the hub, which transformers has just loaded
        return ModelError(
            f"model.attention: {attention} cannot be used here ({_first_line(error)}). Set model.attention=sdpa."
        )
    return ModelError(f"{name}: transformers' {loader} cannot load it ({_first_line(error)}). Use another model.")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
