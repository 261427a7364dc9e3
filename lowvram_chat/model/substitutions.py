"""Substitutions that leave the function as it is and make the step lighter; each has a switch in the recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import masking_utils
from transformers.activations import GELUTanh, NewGELUActivation

if TYPE_CHECKING:
    from torch import nn


def fuse_gelu(model: nn.Module) -> int:
    """Replace `gelu_new`, six kernels and six saved tensors in Python, by torch's tanh GELU; return how many.

    Both are 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). The model's config still says `gelu_new`, so that what is
    saved is an ordinary GPT-2.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for parent, name in places:
        setattr(parent, name, GELUTanh())
    return len(places)


@contextlib.contextmanager
def packing_declared(*, packed: bool) -> Iterator[None]:
    """Tell transformers whether rows are packed, where it would look into their positions on the device, and wait for it.

    Source: transformers/masking_utils.py, `find_packed_sequence_indices` (5.x).
    """
    module: Any = masking_utils
    name = "find_packed_sequence_indices"
    looks = getattr(module, name, None)
    if looks is None:
        yield
        return
    setattr(module, name, _documents if packed else _no_documents)
    try:
        yield
    finally:
        setattr(module, name, looks)


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's document (B, T): one more wherever positions start again."""
    return (position_ids == 0).cumsum(-1)


def _no_documents(position_ids: torch.Tensor) -> None:
    """Rows of one document each need no mask."""


DROPOUT_SETTINGS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "resid_dropout",
    "embed_dropout",
    "attention_dropout_prob",
)
"""Names of dropout probabilities in the configs of GPT-2, GPT-Neo, OPT, Llama, GPT-NeoX and their kin."""


def dropout_settings(config: object, probability: float) -> dict[str, float]:
    """Return the config's dropout fields, each set to `probability`."""
    return {name: probability for name in DROPOUT_SETTINGS if hasattr(config, name)}
