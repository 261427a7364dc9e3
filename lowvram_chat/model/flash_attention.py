"""Where torch has FlashAttention: the cards, the widths of heads, and the builds.

Where it is missing, `scaled_dot_product_attention` takes the memory-efficient kernel instead, which needs the same memory and
more time, and packed rows keep their document mask.
"""

from __future__ import annotations

import torch

from lowvram_chat.gpus import this_system

FLASH_CAPABILITY = (8, 0)
"""Lowest compute capability of FlashAttention-2: Ampere."""
MAX_FLASH_WIDTH, WIDTH_STEP = 256, 8
"""Largest head width of FlashAttention-2, and what a width must be a multiple of."""


def is_built(system: str | None = None) -> bool:
    """Return whether torch's CUDA build for "linux" or "windows" (default: this system) has FlashAttention.

    PyTorch's builds for Windows do not: its build leaves FlashAttention out where the compiler is MSVC. The build that is
    installed here is asked, unless it has no CUDA. Source: CMakeLists.txt, `USE_FLASH_ATTENTION`.
    """
    if torch.version.cuda is not None and system in (None, this_system()):
        return torch.backends.cuda.is_flash_attention_available()
    return (system or this_system()) != "windows"
