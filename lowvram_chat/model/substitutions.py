"""Substitutions that compute the same function with less memory or fewer waits; the recipe can switch them off."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from transformers import masking_utils
from transformers.activations import GELUTanh, NewGELUActivation

from lowvram_chat.private_names import has_private_name

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

PACKED_SEQUENCE_SEARCH = "find_packed_sequence_indices"
"""The function of `transformers.masking_utils` that looks for packed documents in the positions."""


def fuse_gelu(model: nn.Module) -> int:
    """Replace each `gelu_new` module by torch's tanh GELU, and return how many were replaced.

    `gelu_new` is written in Python: it launches six kernels and saves six tensors. Both compute
    0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). The model's config still says `gelu_new`, so the saved model is an
    ordinary GPT-2.
    """
    replaceable = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for parent, name in replaceable:
        setattr(parent, name, GELUTanh())
    return len(replaceable)


@contextlib.contextmanager
def packing_declared(*, packed: bool) -> Iterator[None]:
    """Tell transformers whether rows are packed while the context is open.

    By default transformers compares the positions on the device and waits for the result. It still does so, with a warning,
    if its version has no function that can be replaced.

    Source: transformers/masking_utils.py, `find_packed_sequence_indices` (5.x).
    """
    if not _can_declare_packing():
        yield
        return
    original = getattr(masking_utils, PACKED_SEQUENCE_SEARCH)
    setattr(masking_utils, PACKED_SEQUENCE_SEARCH, _document_numbers if packed else _no_documents)
    try:
        yield
    finally:
        setattr(masking_utils, PACKED_SEQUENCE_SEARCH, original)


@functools.cache
def _can_declare_packing() -> bool:
    """Return whether transformers' search for packed documents can be replaced; log a warning once if it cannot."""
    if has_private_name(f"transformers.masking_utils.{PACKED_SEQUENCE_SEARCH}"):
        return True
    log.warning(
        "transformers %s: masking_utils.%s is gone. transformers now looks for packed documents itself, which waits for the "
        "device in every forward pass. Install the version of transformers in constraints.txt to avoid the wait.",
        metadata.version("transformers"),
        PACKED_SEQUENCE_SEARCH,
    )
    return False


def _document_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's document number (B, T), which grows by one wherever the positions (B, T) restart at 0."""
    return (position_ids == 0).cumsum(-1)


def _no_documents(position_ids: torch.Tensor) -> None:
    """Return None: rows of one document each need no document mask."""


DROPOUT_SETTINGS = (
    "activation_dropout",
    "attention_dropout",
    "attention_dropout_prob",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_p",
    "embd_pdrop",
    "emb_pdrop",
    "embed_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "layerdrop",
    "mlp_dropout",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
)
"""Names of dropout probabilities in the configs of the causal language models of transformers."""
NESTED_CONFIGS = ("attn_config", "text_config")
"""Parts of configs that hold dropout probabilities of their own (MPT)."""


def set_dropout(config: object, probability: float) -> None:
    """Set every dropout probability of a config."""
    for name in DROPOUT_SETTINGS:
        if hasattr(config, name):
            is_typed_int = isinstance(getattr(config, name), int) and probability == 0  # MPT's `attn_pdrop`
            setattr(config, name, 0 if is_typed_int else probability)
    for name in NESTED_CONFIGS:
        if getattr(config, name, None) is not None:
            set_dropout(getattr(config, name), probability)
