"""Where torch has FlashAttention, by card, build and width of heads, and which models' packed rows can use it.

Where it is missing, `scaled_dot_product_attention` takes the memory-efficient kernel instead, which needs the same memory and
more time, and packed rows keep their document mask. `make validate` imports this file with transformers 4.51.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowvram_chat.gpus import this_system

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lowvram_chat.recipe.schema import Recipe

FLASH_CAPABILITY = (8, 0)
"""Lowest compute capability of FlashAttention-2: Ampere."""
MAX_FLASH_WIDTH, WIDTH_STEP = 256, 8
"""Largest head width of FlashAttention-2, and what a width must be a multiple of."""
UNSUPPORTED_MASK_SETTINGS = ("sliding_window", "attention_chunk_size")
"""Config fields of models whose tokens see only part of the earlier tokens."""
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
"""Config fields of the dropout probability of attention."""


def is_built(system: str | None = None) -> bool:
    """Return whether torch's CUDA build for "linux" or "windows" (default: this system) has FlashAttention.

    PyTorch's builds for Windows do not: its build leaves FlashAttention out where the compiler is MSVC. The build that is
    installed here is asked, unless it has no CUDA. Source: CMakeLists.txt, `USE_FLASH_ATTENTION`.
    """
    if torch.version.cuda is not None and system in (None, this_system()):
        return torch.backends.cuda.is_flash_attention_available()
    return (system or this_system()) != "windows"


def why_no_varlen(
    recipe: Recipe, config: PreTrainedConfig, capability: tuple[int, int], *, has_flash: bool
) -> str | None:
    """Return why packed rows of a recipe keep the document mask on a card of this compute capability; None if they do not.

    `has_flash`: torch's build has FlashAttention.
    """
    train = recipe.train
    dropout = next((name for name in ATTENTION_DROPOUTS if getattr(config, name, None)), None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    obstacles = {
        "model.document_attention is false": not recipe.model.document_attention,
        f"model.attention is {recipe.model.attention}": recipe.model.attention != "sdpa",
        "train.compile needs batches of one shape": bool(train.compile),
        f"train.precision is {train.precision}": train.precision == "fp32",
        f"the card has compute capability {capability[0]}.{capability[1]}": capability < FLASH_CAPABILITY,
        "torch was built without FlashAttention, as on Windows": not has_flash,
        f"the model's {dropout} is not 0 (model.dropout=0.0 removes it)": dropout is not None,
        f"its heads are {width} wide": width > MAX_FLASH_WIDTH or width % WIDTH_STEP != 0,
        "not all of its layers have plain causal attention": not is_plain_causal(config),
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)


def is_plain_causal(config: PreTrainedConfig) -> bool:
    """Return whether every layer of a model with this config attends to all earlier tokens."""
    special_layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    return not special_layers and not any(getattr(config, name, None) for name in UNSUPPORTED_MASK_SETTINGS)
