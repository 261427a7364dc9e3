"""Compilation of the training step: torch.compile on the backbone and on a tile of the loss, if a compiler is installed.

All training batches must have one shape, because each new shape is compiled again. Evaluation batches have many lengths,
so evaluation runs uncompiled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_chat.errors import CompilationError, DeviceError
from lowvram_chat.model.out_of_memory import first_line, is_out_of_memory
from lowvram_chat.private_names import check_private_names
from lowvram_chat.recipe.schema import Train

if TYPE_CHECKING:
    from lowvram_chat.model.adapters import ChatModel

check_private_names("torch.nn.Module._compiled_call_impl", "torch.utils._triton.has_triton")

log = logging.getLogger(__name__)


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this device and where to get it, or None if nothing is missing."""
    return (_missing_for_cuda if device.type == "cuda" else _missing_for_cpu)() or _missing_headers()


def switched_off_by() -> str | None:
    """Return the environment variable that switches torch.compile off: models would run eagerly without an error.

    Source: torch/_dynamo/eval_frame.py, `_optimize`; torch/_dynamo/config.py, `disable`.
    """
    variables = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    return next((f"{name}=1" for name in variables if os.environ.get(name) == "1"), None)


def _missing_for_cuda() -> str | None:
    """Return what compiling for CUDA lacks: Triton, or the C compiler that builds its kernel launchers.

    Source: triton/runtime/build.py: launchers are compiled with $CC, gcc or clang.
    """
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton (pip install triton; on Windows triton-windows, which includes a compiler)"
    if os.name == "nt" or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "a C compiler (gcc or clang)"


def _missing_for_cpu() -> str | None:
    """Return what compiling for a CPU lacks: the C++ compiler that torch looks for."""
    check_private_names("torch._inductor.cpp_builder.get_cpp_compiler")
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:  # `torch._inductor.exc.InvalidCxxCompiler` is one
        return "a C++ compiler (g++ or clang; on Windows the Visual Studio build tools)"
    return None


def _missing_headers() -> str | None:
    """Return what is missing if Python.h is not installed: compiled code includes it, and Linux packages it separately."""
    folder = sysconfig.get_path("include", "nt" if os.name == "nt" else "posix_prefix")
    if Path(folder, "Python.h").is_file():
        return None
    return "Python.h (on Debian and Ubuntu the package python3-dev, elsewhere python3-devel)"


def should_compile(train: Train, device: torch.device) -> bool:
    """Return whether the run is compiled.

    Raises:
        DeviceError: `train.compile` is true and a compiler is missing, or torch.compile is switched off.
    """
    if not train.compile:
        return False
    missing, variable = missing_compiler(device), switched_off_by()
    if missing is None and variable is None:
        return True
    reason = f"this machine lacks {missing}" if missing else f"{variable} switches torch.compile off"
    if train.compile == "if_possible":
        log.info("train.compile: not compiled, since %s", reason)
        return False
    remedy = "Install it" if missing else "Unset that variable"
    raise DeviceError(f"train.compile: {reason}. {remedy}, or add train.compile=if_possible to run uncompiled.")


@contextlib.contextmanager
def compilation_explained() -> Iterator[None]:
    """Turn what fails in the first call of a compiled model into an error with the reason, except for a lack of memory.

    There are many reasons beside a missing compiler: Visual Studio without cl.exe on the path, folders with long or non-ASCII
    names, a Triton that does not know the card, a full temporary folder. Each raises another class of error.

    Raises:
        CompilationError: with the first line of the error.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason: BaseException = error
        while inner := getattr(reason, "inner_exception", None) or reason.__cause__:  # torch wraps a compiler's error
            reason = inner
        raise CompilationError(
            f"train.compile: torch.compile fails on this machine ({first_line(reason)}). Add train.compile=false, or "
            "if_possible to run uncompiled where it fails."
        ) from error


def compile_blocks(model: ChatModel) -> None:
    """Compile the model's backbone at its first call, and its loss with it. Module names and weights do not change.

    What this process compiled for earlier models is dropped: past `torch._dynamo.config.recompile_limit` versions of one
    function, torch would run this model eagerly without an error.
    """
    from lowvram_chat.model.adapters import base_model_of

    torch.compiler.reset()
    base_model_of(model).base_model.compile(dynamic=False)


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether `module.compile()` was called on this module."""
    return module._compiled_call_impl is not None


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Run compiled modules eagerly while the context is open."""
    has_compiled = any(is_compiled(module) for module in model.modules())
    with torch.compiler.set_stance("force_eager") if has_compiled else contextlib.nullcontext():
        yield
