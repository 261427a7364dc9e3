"""Tracks which module's forward is running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class ModuleNames:
    """The names of the modules whose forward is running, while `active` is open."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._running: list[str] = []

    @property
    def innermost(self) -> str:
        """Name of the innermost running module, or "" if none is running."""
        return self._running[-1] if self._running else ""

    def add(self, model: torch.nn.Module) -> None:
        """Use the names of this model's modules. A module without a name is called by its class."""
        self._names.update((id(module), name) for name, module in model.named_modules())

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Track running modules."""

        def push(module: torch.nn.Module, _: object) -> None:
            self._running.append(self._names.get(id(module), type(module).__name__))

        def pop(*_: object) -> None:
            self._running.pop()

        hooks = torch.nn.modules.module
        handles = (
            hooks.register_module_forward_pre_hook(push),
            hooks.register_module_forward_hook(pop, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
