"""Memory over a step, drawn: what is allocated, stacked by category, what is reserved, and the card's limit."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

from lowvram_chat.errors import DeviceError, UsageError
from lowvram_chat.gpus import CONTEXT_MIB, GPUS
from lowvram_chat.planning.allocator import CachingAllocator
from lowvram_chat.planning.prediction import card_limits, longest_rows_run, plan_category
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.units import MIB

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
"""From the bottom: what stays, then what comes and goes."""


FILE_TYPES = (".png", ".svg", ".pdf")


def check_plot_file(path: Path) -> None:
    """Refuses to draw where matplotlib is missing, or into a file that cannot be.

    Raises:
        DeviceError: no matplotlib.
        UsageError: an unknown ending, or no such folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("--plot: matplotlib is not installed. pip install 'lowvram-chat[plot]', or leave --plot out.")
    if path.suffix.lower() not in FILE_TYPES:
        raise UsageError(f"--plot: {path} does not say what to draw. End it in one of {', '.join(FILE_TYPES)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--plot: {path.parent} is no folder. Make it first, or give another.")


def memory_series(recipe: Recipe) -> tuple[dict[str, list[float]], list[float]]:
    """Returns MiB after each event of a run of the longest rows: (allocated by category, reserved).

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    card, blocks, sums = CachingAllocator(), {}, Counter[str]()
    allocated: dict[str, list[float]] = {category: [] for category in STACKING_ORDER}
    reserved = []
    for storage, is_allocation in longest_rows_run(recipe):
        sums[plan_category(storage)] += storage.nbytes if is_allocation else -storage.nbytes
        if storage.nbytes and is_allocation:
            blocks[storage] = card.malloc(storage.nbytes)
        elif storage.nbytes and (block := blocks.pop(storage)) is not None:
            card.free(block)
        for category in STACKING_ORDER:
            allocated[category].append(sums[category] / MIB)
        reserved.append(card.reserved_bytes / MIB)
    return allocated, reserved


def draw_memory(recipe: Recipe, path: Path) -> None:
    """Writes the picture; its type follows the ending. Raises: as `check_plot_file` and `memory_series`."""
    check_plot_file(path)
    allocated, reserved = memory_series(recipe)
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    places = range(len(reserved))
    axes.stackplot(places, *allocated.values(), labels=list(allocated), step="post")
    axes.plot(places, reserved, color="black", linewidth=0.8, label="reserved")
    _limits(axes, recipe)
    axes.set(xlabel="allocations and frees, in order", ylabel="MiB", xlim=(0, len(reserved)))
    axes.set_title(_title(recipe))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _title(recipe: Recipe) -> str:
    adapter = "full fine-tuning" if recipe.adapter is None else recipe.adapter.kind
    return (
        f"predicted memory: {recipe.model.name}, {adapter}, micro-batch {recipe.train.per_device_train_batch_size} x "
        f"{recipe.data.max_length}\nrehearsal, evaluation, first step, then full steps and evaluations"
    )


def _limits(axes: Any, recipe: Recipe) -> None:
    """A line where the allocator finds the card full: what is usable, less the context."""
    for system, nbytes in card_limits(recipe).items():
        title = GPUS[recipe.memory.gpu].title if recipe.memory.limit_mib is None else "memory.limit_mib"
        style = "--" if system == "linux" else ":"
        axes.axhline(nbytes / MIB - CONTEXT_MIB, color="red", linestyle=style, label=f"{title}, {system}, less context")
