"""The step, compiled: torch.compile on the backbone and on a tile of the loss, where a compiler is there.

Batches must have one shape, since each new one is compiled anew; evaluations, whose batches are of many lengths, run as
written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowvram_chat.errors import DeviceError
from lowvram_chat.recipe.schema import Train

log = logging.getLogger(__name__)


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this device, and where it comes from; None where nothing is missing."""
    return (_missing_for_cuda if device.type == "cuda" else _missing_for_cpu)() or _missing_headers()


def _missing_for_cuda() -> str | None:
    """Source: triton/runtime/build.py: what launches a kernel is compiled with $CC, gcc or clang."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton (pip install triton; on Windows triton-windows, which has a compiler of its own)"
    if os.name == "nt" or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "a C compiler (gcc or clang)"


def _missing_for_cpu() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "a C++ compiler (g++ or clang; on Windows the Visual Studio build tools)"
    return None


def _missing_headers() -> str | None:
    """What is compiled includes Python.h, which system Pythons have in a package of its own."""
    folder = sysconfig.get_path("include", "nt" if os.name == "nt" else "posix_prefix")
    if Path(folder, "Python.h").is_file():
        return None
    return "Python.h (on Debian and Ubuntu the package python3-dev, elsewhere python3-devel)"


def should_compile(train: Train, device: torch.device) -> bool:
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
def uncompiled(model: Any) -> Iterator[None]:
    """Run what is compiled as it is written while the context is open."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield
