"""Stops a run whose weights or optimizer states are NaN or infinite, before they replace a good state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lowvram_chat.errors import DivergedError

if TYPE_CHECKING:
    from lowvram_chat.recipe.schema import Recipe

MAX_SKIPPED_STEPS = 30
"""Overflowing fp16 steps in a row with which a run goes on: each halves the scaler's scale of 65,536, to 6e-5."""
LISTED_CONVERSATIONS = 20


class FiniteGuard:
    """Looks at losses, weights and states of a run, and knows which conversations the last steps had."""

    def __init__(self, recipe: Recipe) -> None:
        """Start with no steps."""
        self.recipe = recipe
        self.skipped = 0
        self.conversations: list[int] = []
        self.were_logged = False

    def saw(self, conversations: Iterable[int]) -> None:
        """Remember the conversations of a micro-batch; those of steps that were logged and found good are forgotten."""
        if self.were_logged:
            self.conversations.clear()
            self.were_logged = False
        self.conversations.extend(conversations)

    def after_step(self, step: int, *, was_skipped: bool) -> None:
        """Count fp16 steps in a row that overflowed.

        Raises:
            DivergedError: there were more than `MAX_SKIPPED_STEPS`.
        """
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped > MAX_SKIPPED_STEPS:
            raise DivergedError(self._message(f"step {step}: {self.skipped} fp16 steps in a row overflowed"))

    def check_logged(self, step: int, logged: Mapping[str, float], model: torch.nn.Module) -> None:
        """Look at the weights if what was logged is not finite. An fp16 step that overflows is skipped, and its loss is logged.

        Raises:
            DivergedError: weights are not finite.
        """
        odd = [name for name in ("loss", "grad_norm") if not math.isfinite(logged.get(name, 0.0))]
        if odd and (wrong := not_finite(_trained(model))):
            reason = f"step {step}: {' and '.join(odd)} are not finite, and neither are {wrong} of the weights"
            raise DivergedError(self._message(reason))
        self.were_logged = True

    def check(self, step: int, model: torch.nn.Module, optimizer: object = None) -> None:
        """Look at weights and states before they are saved.

        Raises:
            DivergedError: some are not finite.
        """
        for what, tensors in (("weights", _trained(model)), ("optimizer states", _states(optimizer))):
            if wrong := not_finite(tensors):
                raise DivergedError(self._message(f"step {step}: {wrong} of the {what} are NaN or infinite"))

    def _message(self, reason: str) -> str:
        train, numbers = self.recipe.train, self.conversations
        other = {"fp16": ", or train.precision=bf16 or fp32", "bf16": ", or train.precision=fp32"}.get(
            train.precision, ""
        )
        listed = ", ".join(map(str, numbers[:LISTED_CONVERSATIONS])) + (
            " ..." if len(numbers) > LISTED_CONVERSATIONS else ""
        )
        rows = f" The last steps had these conversations: {listed}." if numbers else ""
        return (
            f"{reason}, so the run was stopped and this state was not saved. Checkpoints are as they were.{rows} Start again "
            f"with a lower train.learning_rate (it was {train.learning_rate:g}), a longer train.warmup_ratio{other}."
        )


def not_finite(tensors: Iterable[torch.Tensor]) -> str:
    """Return how many of the tensors hold NaN or infinity, as "2 of 148"; empty if none does. It waits for each device once.

    A sum is NaN or infinite if a value is, and unlike `isfinite` needs no memory of the tensor's size.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            by_device.setdefault(tensor.device, []).append(tensor.detach().sum(dtype=torch.float32))
    found = [good for sums in by_device.values() for good in torch.stack(sums).isfinite().tolist()]
    return "" if all(found) else f"{found.count(False)} of {len(found)}"


def _trained(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights that are trained."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _states(optimizer: object) -> Iterator[torch.Tensor]:
    """Yield the state tensors of an optimizer; those that are quantised are integers with floating-point scales."""
    state: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for of_parameter in state.values():
        for value in of_parameter.values() if isinstance(of_parameter, Mapping) else ():
            if isinstance(value, torch.Tensor):
                yield value
