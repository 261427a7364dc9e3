"""What bitsandbytes keeps outside its optimizers, and the paged states that it unpages.

bitsandbytes has one manager of settings and one of paged tensors for a whole process. The Trainer registers every embedding
with the first, so a run that is over would keep its embeddings and their gradients alive, and its settings would apply to
whatever parameters of the next run have the same places. Loading a checkpoint also turns paged states into ordinary tensors of
the card. Source: bitsandbytes/optim/optimizer.py, `GlobalOptimManager`, `Optimizer8bit.load_state_dict`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lowvram_chat.tracing.optimizer import MIN_PAGED_ELEMENTS

PAGED_STATES = ("state1", "state2")
"""Names of the states that bitsandbytes pages."""


def forget_earlier_optimizers() -> None:
    """Empty the managers of bitsandbytes, before a run builds its optimizer and after a run is over."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.functional import GlobalPageManager
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()
    GlobalPageManager.get_instance().initialize()


@contextlib.contextmanager
def states_stay_paged(optimizer: Any) -> Iterator[None]:
    """While the context is open, load the large states of a paged optimizer into paged memory, without a stop on the card."""
    if not getattr(optimizer, "is_paged", False):
        yield
        return
    load = optimizer.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        load(state_dict, move_to_device=False)  # the first step moves what is not paged
        for parameter, state in optimizer.state.items():
            for name in PAGED_STATES:
                if name in state and parameter.numel() >= MIN_PAGED_ELEMENTS and parameter.device.type == "cuda":
                    state[name] = _paged(optimizer, state[name], parameter.device)

    vars(optimizer)["load_state_dict"] = load_state_dict  # shadows the method, for this optimizer only
    try:
        yield
    finally:
        del vars(optimizer)["load_state_dict"]


def _paged(optimizer: Any, state: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a state in paged memory, registered as `Optimizer8bit.get_state_buffer` does it."""
    from bitsandbytes.functional import get_paged

    buffer: torch.Tensor = get_paged(*state.shape, dtype=state.dtype, device=device)
    buffer.copy_(state)
    optimizer.page_mng.paged_tensors.append(buffer)
    return buffer
