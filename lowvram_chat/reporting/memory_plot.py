"""Plots predicted memory over a run: allocated bytes stacked by category, reserved bytes, and the limits of the card."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat.errors import DeviceError, UsageError
from lowvram_chat.planning.allocator import CachingAllocator
from lowvram_chat.planning.prediction import longest_rows_run, plan_category
from lowvram_chat.recipe.card import card_of, limits_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.reporting.output_file import check_output_file
from lowvram_chat.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STACKING_ORDER = (
    "weights",
    "optimizer state",
    "cuBLAS",
    "gradients",
    "weight copies",
    "activations",
    "loss",
    "temporaries",
)
"""Categories from bottom to top: first those that stay allocated, then those that are allocated and freed in each step."""
FILE_TYPES = (".png", ".svg", ".pdf")


def check_plot_file(path: Path) -> None:
    """Check that a plot can be drawn and that `path` can be written.

    Raises:
        DeviceError: matplotlib is not installed.
        UsageError: the suffix is unknown, or the folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("--plot: matplotlib is not installed. pip install 'lowvram-chat[plot]', or omit --plot.")
    if path.suffix.lower() not in FILE_TYPES:
        raise UsageError(f"--plot: {path} has no known file type. Use one of {', '.join(FILE_TYPES)} as its suffix.")
    check_output_file("--plot", path)


def memory_series(recipe: Recipe) -> tuple[dict[str, list[float]], list[float]]:
    """Return the MiB after each allocation and each free of a run in which every row has the maximum length.

    The first value is category -> allocated MiB, the second is the reserved MiB.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be loaded.
    """
    allocator, blocks, category_bytes = CachingAllocator(), {}, Counter[str]()
    allocated: dict[str, list[float]] = {category: [] for category in STACKING_ORDER}
    reserved = []
    for storage, is_allocation in longest_rows_run(recipe):
        category_bytes[plan_category(storage)] += storage.nbytes if is_allocation else -storage.nbytes
        if storage.nbytes and is_allocation:
            blocks[storage] = allocator.malloc(storage.nbytes)
        elif storage.nbytes and (block := blocks.pop(storage)) is not None:
            allocator.free(block)
        for category in STACKING_ORDER:
            allocated[category].append(category_bytes[category] / MIB)
        reserved.append(allocator.reserved_bytes / MIB)
    return allocated, reserved


def draw_memory(recipe: Recipe, path: Path) -> None:
    """Draw the memory of a recipe's run into a file, whose suffix decides the file type.

    Raises:
        DeviceError, UsageError: see `check_plot_file`.
        NotFoundError, ModelError: see `memory_series`.
    """
    check_plot_file(path)
    allocated, reserved = memory_series(recipe)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    positions = range(len(reserved))
    axes.stackplot(positions, *allocated.values(), labels=list(allocated), step="post")
    axes.plot(positions, reserved, color="black", linewidth=0.8, label="reserved")
    _draw_limits(axes, recipe)
    axes.set(xlabel="allocations and frees, in order", ylabel="MiB", xlim=(0, len(reserved)))
    axes.set_title(_title(recipe))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _title(recipe: Recipe) -> str:
    adapter = "full fine-tuning" if recipe.adapter is None else recipe.adapter.kind
    return (
        f"predicted memory: {recipe.model.name}, {adapter}, micro-batch {recipe.train.per_device_train_batch_size} x "
        f"{recipe.data.max_length}\npreflight, evaluation, first step, then full steps and evaluations"
    )


def _draw_limits(axes: Axes, recipe: Recipe) -> None:
    """Draw a line at the bytes that the allocator can reserve: the usable memory of the card without the CUDA context."""
    title = card_of(recipe.memory).title if recipe.memory.limit_mib is None else "memory.limit_mib"
    for system, nbytes in limits_of(recipe.memory).items():
        style = "--" if system == "linux" else ":"
        label = f"{title}, {system}, without context"
        axes.axhline(nbytes / MIB - card_of(recipe.memory).context_mib, color="red", linestyle=style, label=label)
