"""Substitutions that leave the function as it is and make the step lighter; each has a switch in the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


DROPOUTS = (
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
    return {name: probability for name in DROPOUTS if hasattr(config, name)}
