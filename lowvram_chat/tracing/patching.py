"""Replaces names of a module for as long as a context is open.

A `TorchFunctionMode` cannot serve here: autograd disables it, and gradient checkpointing runs the forward pass again
inside the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def patched(module: ModuleType, **replacements: object) -> Iterator[None]:
    """Replace names of `module`, and restore them on exit.

    Raises:
        KeyError: the module has no such name.
    """
    originals = {name: vars(module)[name] for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(originals)
