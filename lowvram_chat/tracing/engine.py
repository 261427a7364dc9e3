"""Decides where autograd's engine adds two gradients in place, which it never does under a dispatch mode.

The engine writes the sum into the first gradient when nothing else holds that tensor or its storage (a view's base
counts as a holder). A dispatch mode is such a holder, so a trace would see a new tensor where a real run has none.
Source: torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch

from lowvram_chat.private_names import check_private_names

check_private_names(
    "torch.Tensor._use_count",
    "torch.UntypedStorage._cdata",
    "torch._C._current_graph_task_id",
    "torch._C._storage_Use_Count",
    "torch._compile._disable_dynamo",
    "torch.autograd.graph._engine_run_backward",
)

WRAPPER_FILES = (
    __file__,
    str(Path(__file__).with_name("recorder.py")),
    str(Path("_dynamo", "eval_frame.py")),
    str(Path("torch", "_compile.py")),
)
"""Ends of the paths of files whose frames stand between an operation's caller and this file."""

ENGINE_TENSOR_COUNT = 4
"""References to a gradient that only autograd's engine holds, counted under a dispatch mode (a test checks this)."""
ENGINE_STORAGE_COUNT = 2
"""References to that gradient's storage."""


def is_in_backward() -> bool:
    """Return whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def accumulates_in_place(gradient: torch.Tensor) -> bool:
    """Return whether the engine, which now adds to `gradient`, would add in place without a dispatch mode."""
    if not is_in_backward() or torch.is_grad_enabled() or not _is_called_by_engine():
        return False
    storage_count = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    tensor_count = gradient._use_count()  # type: ignore[attr-defined]  # missing in PyTorch's stubs
    return bool(tensor_count <= ENGINE_TENSOR_COUNT and storage_count <= ENGINE_STORAGE_COUNT)


def _is_called_by_engine() -> bool:
    """Return whether the engine itself called the operation, and not the Python code of a custom backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPER_FILES):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
