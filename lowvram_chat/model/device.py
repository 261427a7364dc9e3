"""The device that a run uses, and whether it can do what the recipe asks for."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import sys
import timeit
from collections.abc import Callable

import psutil
import torch

from lowvram_chat.errors import DeviceError
from lowvram_chat.recipe.choices import portable_attention
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.units import MIB, format_mib

log = logging.getLogger(__name__)


def check_device(recipe: Recipe) -> torch.device:
    """Return the device of a run, and log what is slow or has no effect on it.

    Raises:
        DeviceError: fp16 without CUDA, bf16 on a GPU without it, or an attention kernel without CUDA or its package.
    """
    cuda = torch.cuda.is_available()
    _check_precision(recipe.train.precision, cuda=cuda)
    _check_attention(recipe.model.attention, cuda=cuda)
    if OPTIMIZERS[recipe.optimizer.name].paged and not cuda:
        log.info("optimizer.name: %s pages its states only on CUDA; here they stay in memory", recipe.optimizer.name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def _check_attention(attention: str, *, cuda: bool) -> None:
    """Refuse an attention implementation that lacks its package, or a graphics card.

    Raises:
        DeviceError: what it lacks.
    """
    if attention == portable_attention(attention):
        return
    module, package = ("flash_attn", "flash-attn") if attention == "flash_attention_2" else ("kernels", "kernels")
    if importlib.util.find_spec(module) is None:
        raise DeviceError(f"model.attention: {attention} needs the package {package}. Add model.attention=sdpa.")
    if not cuda:
        raise DeviceError(f"model.attention: {attention} needs a CUDA graphics card. Add model.attention=sdpa.")


def choose_device(wanted: str, needed_bytes: Callable[[], int]) -> torch.device:
    """Return the device to open a model on; `needed_bytes` returns what the model needs on a graphics card.

    Raises:
        DeviceError: CUDA is asked for, and no graphics card is usable.
    """
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise DeviceError(
            "--device: no CUDA graphics card is usable here. Give --device cpu, or see python -m lowvram_chat.doctor."
        )
    if wanted == "cpu" or not cuda:
        return torch.device("cpu")
    if wanted == "auto":
        needed, free = needed_bytes(), torch.cuda.mem_get_info()[0]
        if needed > free:
            log.info(
                "the graphics card has %s MiB free and the model needs about %s MiB, so it runs on the CPU (--device cuda tries "
                "the card)",
                format_mib(free),
                format_mib(needed),
            )
            return torch.device("cpu")
    return torch.device("cuda", 0)


def _check_precision(precision: str, *, cuda: bool) -> None:
    """Refuse a precision that the device does not have, and warn if it only emulates it.

    Raises:
        DeviceError: fp16 without CUDA, or bf16 on a GPU without it.
    """
    if precision == "fp16" and not cuda:
        raise DeviceError(
            "train.precision: fp16 needs a CUDA graphics card, and none is usable here. On a CPU it would silently be fp32. "
            "Add train.precision=fp32, or see python -m lowvram_chat.doctor."
        )
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"train.precision: {torch.cuda.get_device_name(0)} does not compute in bf16. Add train.precision=fp16."
        )
    if precision == "bf16" and not cuda and (slowdown := bf16_slowdown()) > 2:
        log.warning(
            "train.precision: this processor takes %.0f times as long for bf16 as for fp32. Add train.precision=fp32.",
            slowdown,
        )


def bf16_slowdown() -> float:
    """Return how many times as long the CPU takes for a matrix product in bf16 as in fp32: about 50 if it emulates bf16."""

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: square @ square, number=1, repeat=3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def set_fp16_accumulation(*, wanted: bool) -> None:
    """Choose whether CUDA sums fp16 matrix products in fp16, or in fp32 as by default. GeForce cards are twice as fast in fp16.

    Source: torch.backends.cuda.matmul.allow_fp16_accumulation (2.7).
    """
    torch.backends.cuda.matmul.allow_fp16_accumulation = wanted
    if wanted:
        log.warning(
            "train.fp16_accumulation: matrix products are summed in fp16. Watch the loss, because sums can overflow or lose "
            "precision."
        )


def move_to_device(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module's parameters and buffers to a device, in place."""
    module.to(device)


SPAWNED_WORKER_MIB = 900
"""Main memory of a worker process on Windows, where it is spawned and imports torch and transformers again. Our estimate: 500 MiB
with a CPU build of torch on Linux, and a CUDA build's libraries."""
SMALL_MACHINE_MIB = 12 * 1024
"""Main memory below which Windows gets no worker process."""


def default_workers(*, cuda: bool) -> int:
    """Return the number of processes that prepare batches, where the recipe gives none: 2 on CUDA, none on a CPU.

    Collating is little work, so a worker hides little. On Windows it is spawned and takes `SPAWNED_WORKER_MIB`: one there, and
    none on a machine with 8 GB.
    """
    if not cuda:
        return 0
    if sys.platform != "win32":
        return 2
    workers = 0 if psutil.virtual_memory().total // MIB < SMALL_MACHINE_MIB else 1
    log.info(
        "train.dataloader_num_workers: %s prepares batches, because each would import torch again and take about %d MiB",
        "one process" if workers else "no process of its own",
        SPAWNED_WORKER_MIB,
    )
    return workers


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt. Source: glibc's malloc.h."""


def keep_freed_pages(device: torch.device) -> None:
    """Make a CPU run keep freed memory for the next step. New pages cost about 7 % of a step; a few MiB stay unused.

    By default glibc returns every large block to Linux when it is freed. Source: mallopt(3).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
