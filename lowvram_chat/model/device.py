"""Which device a run gets, and whether it can do what the recipe asks."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import timeit

import torch

from lowvram_chat.errors import DeviceError
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe

log = logging.getLogger(__name__)


def check_device(recipe: Recipe) -> torch.device:
    """Return the device of a run.

    Raises:
        DeviceError: fp16 without CUDA, bf16 on a card without it, or a library that the recipe needs and is missing.
    """
    cuda = torch.cuda.is_available()
    precision = recipe.train.precision
    if precision == "fp16" and not cuda:
        raise DeviceError(
            "train.precision: fp16 needs a CUDA graphics card and none is usable here; on a CPU it would silently be fp32. "
            "Add train.precision=fp32, or see python -m lowvram_chat.doctor."
        )
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"train.precision: {torch.cuda.get_device_name(0)} does not compute in bf16. Add train.precision=fp16."
        )
    if precision == "bf16" and not cuda and (slower := bf16_slowdown()) > 2:
        log.warning(
            "train.precision: this processor takes %.0f times as long for bf16 as for fp32. Add train.precision=fp32.",
            slower,
        )
    if recipe.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise DeviceError("model.attention: flash_attention_2 needs the package flash-attn. Add model.attention=sdpa.")
    if OPTIMIZERS[recipe.optimizer.name].paged and not cuda:
        log.info("optimizer.name: %s pages its states only on CUDA; here they stay in memory", recipe.optimizer.name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def bf16_slowdown() -> float:
    """Return how much longer the CPU takes for a product of matrices in bf16 than in fp32: 50 times where it emulates it."""

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: square @ square, number=1, repeat=3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def set_fp16_accumulation(*, wanted: bool) -> None:
    """Let CUDA sum fp16 matrix products in fp16, or in fp32 as it does by default.

    Source: torch.backends.cuda.matmul.allow_fp16_accumulation (2.7); GeForce cards have twice the rate for it.
    """
    torch.backends.cuda.matmul.allow_fp16_accumulation = wanted
    if wanted:
        log.warning(
            "train.fp16_accumulation: matrix products are summed in fp16: watch the loss, since sums can overflow or round"
        )


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed_pages(device: torch.device) -> None:
    """Let a CPU run reuse the memory of the step before: fresh pages cost some 7 % of a step, and a few MiB stay unused.

    By default glibc gives every large block back to Linux when it is freed. Source: mallopt(3).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
