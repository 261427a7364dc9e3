"""The step, compiled: torch.compile on the backbone and on a tile of the loss, where a compiler is there.

Batches must have one shape, since each new one is compiled anew; evaluations, whose batches are of many lengths, run as
written.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from lowvram_chat.errors import DeviceError
from lowvram_chat.recipe.schema import Train

log = logging.getLogger(__name__)


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this device, and where it comes from; None where nothing is missing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton (pip install triton; on Windows triton-windows)"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "a C++ compiler (g++ or clang; on Windows the Visual Studio build tools)"
    return None


def wants_compile(train: Train, device: torch.device) -> bool:
    """Return whether the run is compiled.

    Raises:
        DeviceError: `train.compile` says true, and a compiler is missing.
    """
    if not train.compile:
        return False
    missing = missing_compiler(device)
    if missing is None:
        return True
    if train.compile == "if_possible":
        log.info("train.compile: not compiled, since this machine lacks %s", missing)
        return False
    raise DeviceError(
        f"train.compile: this machine lacks {missing}. Install it, or add train.compile=if_possible to go on without."
    )


def compile_blocks(model: Any) -> None:
    """Let the model's backbone be compiled at its first call, and its loss with it; names and weights stay as they are."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.base_model.compile(dynamic=False)


@contextlib.contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Run what is compiled as it is written while the context is open."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield
