"""Predicts the peak GPU memory of a recipe.

    make_plan(recipe).fits
    make_plan(recipe).on_card_bytes

The run is traced once (`tracing.run`), its steps are composed into several runs (`planning.runs`), and each run is replayed
through a simulated allocator (`planning.replay`). The largest reserved peak counts.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lowvram_chat.errors import LowVramError, ModelError
from lowvram_chat.gpus import this_system
from lowvram_chat.model import flash_attention
from lowvram_chat.planning.plan import LIMIT_SETTING, Plan, TensorGroup
from lowvram_chat.planning.replay import Replay, live_storages_at, replay
from lowvram_chat.planning.runs import composed_runs, traced_steps
from lowvram_chat.recipe.card import card_of, limits_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.recorder import Event, Storage
from lowvram_chat.tracing.run import RunTrace, trace_run
from lowvram_chat.units import MIB

HOPPER = (9, 0)
CUBLAS_WORKSPACE_BYTES, HOPPER_WORKSPACE_BYTES = 8519680, 32 * MIB
"""cuBLAS's workspace of one thread: below compute capability 9.0, and from there on.

Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `:4096:2:16:8` and `:4096:8`. Measured on an H200 (9.0)."""
MAX_LISTED_TENSORS = 8
"""Groups of tensors that a plan lists."""

CATEGORIES = {
    "weights": "weights",
    "buffers": "weights",
    "weight copies": "weight copies",
    "gradients": "gradients",
    "optimizer state": "optimizer state",
    "batch": "activations",
    "forward": "activations",
    "evaluation": "activations",
    "loss": "loss",
    "workspace": "cuBLAS",
}
"""Category of a traced storage -> category in a plan. Everything else is "temporaries"."""


def make_plan(recipe: Recipe) -> Plan:
    """Return the plan of a recipe. Tracing takes seconds; plans are cached.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be loaded.
    """
    with _tracing_explained(recipe):
        return _cached_plan(_cache_key(recipe))


@contextlib.contextmanager
def _tracing_explained(recipe: Recipe) -> Iterator[None]:
    """Turn what fails inside the trace of a model into an error with the reason: some operations have no fake kernel.

    Raises:
        ModelError: the model cannot be traced.
    """
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the stack of an operation that fails
    level = torch_log.level
    torch_log.setLevel(logging.CRITICAL)
    try:
        yield
    except LowVramError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{recipe.model.name}: the planner cannot trace this model ({reason}), so its memory is not known beforehand. sft "
            "--force trains it without a plan."
        ) from error
    finally:
        torch_log.setLevel(level)


def longest_rows_run(recipe: Recipe) -> list[Event]:
    """Return the events of a run in which every row has the maximum length. Raises as `make_plan`."""
    with _tracing_explained(recipe):
        return next(composed_runs(_cached_trace(_cache_key(recipe), this_system())))


def card_rules(recipe: Recipe, system: str | None = None) -> CudaRules:
    """Return the tracing rules of the recipe's card on "linux" or "windows" (default: this system)."""
    capability = card_of(recipe.memory).compute_capability
    return CudaRules(
        capability,
        cublas_workspace_bytes=HOPPER_WORKSPACE_BYTES if capability >= HOPPER else CUBLAS_WORKSPACE_BYTES,
        has_flash=flash_attention.is_built(system),
        plain_rows=not recipe.data.attention_mask,
    )


def plan_category(storage: Storage) -> str:
    """Return the plan's category of a storage."""
    return CATEGORIES.get(storage.category, "temporaries")


@dataclass(frozen=True)
class _CacheKey:
    """A recipe that compares and hashes by its JSON and its model's local configuration."""

    json: str
    recipe: Recipe = field(compare=False)


def _cache_key(recipe: Recipe) -> _CacheKey:
    reduced = _memory_settings(recipe)
    return _CacheKey(reduced.model_dump_json() + _local_config(recipe.model.name), reduced)


def _local_config(name: str) -> str:
    """Return the configuration file of a local model folder, which can change between plans; empty for other models."""
    path = Path(name, "config.json")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@lru_cache(maxsize=2)
def _cached_trace(key: _CacheKey, system: str) -> RunTrace:
    return trace_run(key.recipe, card_rules(key.recipe, system), traced_steps(key.recipe))


class _Runs:
    """The runs that a plan considers, and their replays."""

    def __init__(self, runs: Iterable[list[Event]]) -> None:
        self.events = list(runs)
        self.replays = [replay(events) for events in self.events]
        self.worst = max(range(len(self.events)), key=lambda number: self.replays[number].peak_reserved_bytes)

    @property
    def peak_reserved_bytes(self) -> int:
        return self.replays[self.worst].peak_reserved_bytes

    def fit(self, limit_bytes: int) -> bool:
        """Return whether every run completes within the limit, with cached segments released where that is necessary."""
        return all(
            result.peak_reserved_bytes <= limit_bytes or replay(events, limit_bytes).out_of_memory_at is None
            for events, result in zip(self.events, self.replays, strict=True)
        )


@lru_cache(maxsize=64)
def _cached_plan(key: _CacheKey) -> Plan:
    recipe, traced = key.recipe, _cached_trace(key, this_system())
    here = _Runs(composed_runs(traced))
    events, peak = here.events[here.worst], here.replays[here.worst]
    limits, context = limits_of(recipe.memory), card_of(recipe.memory).context_mib * MIB
    runs = {
        system: here if _same_memory(recipe, system) else _Runs(composed_runs(_cached_trace(key, system)))
        for system in limits
    }
    outside = {"linux": context, "windows": context + traced.paged_bytes}
    paged = {"paged optimizer state": traced.paged_bytes} if traced.paged_bytes and this_system() == "windows" else {}
    return Plan(
        budget=card_of(recipe.memory).title if recipe.memory.limit_mib is None else LIMIT_SETTING,
        peak_allocated_bytes=max(result.peak_allocated_bytes for result in here.replays),
        peak_reserved_bytes=peak.peak_reserved_bytes,
        reserved_on={system: run.peak_reserved_bytes for system, run in runs.items()},
        longest_reserved_bytes=here.replays[0].peak_reserved_bytes,
        context_bytes=context,
        paged_bytes=traced.paged_bytes,
        categories=_categories(events, peak) | {"context": context} | paged,
        phase=events[peak.peak_at].storage.phase,
        largest=_largest_tensors(live_storages_at(events, peak.peak_at)),
        parameters=traced.parameters,
        trained=traced.trained,
        limits=limits,
        fits_on={system: runs[system].fit(limit - outside[system]) for system, limit in limits.items()},
        work=traced.work,
    )


def _memory_settings(recipe: Recipe) -> Recipe:
    """Return the recipe without the settings that do not change its memory, so that one trace serves all such recipes."""
    data, train = recipe.data, recipe.train
    evaluates = data.eval_source is not None or data.eval_split is not None or data.eval_fraction is not None
    return recipe.model_copy(
        update={
            "data": type(data)(
                max_length=data.max_length,
                eval_source="-" if evaluates else None,
                rows="packed" if data.rows == "packed" else "padded",
                attention_mask=data.attention_mask,
            ),
            "train": type(train)(
                precision=train.precision,
                compile=bool(train.compile) and data.rows == "packed",  # compiled packed rows have a mask
                gradient_checkpointing=train.gradient_checkpointing,
                per_device_train_batch_size=train.per_device_train_batch_size,
                gradient_accumulation_steps=min(2, train.gradient_accumulation_steps),
                per_device_eval_batch_size=train.per_device_eval_batch_size if evaluates else 1,
            ),
            "memory": recipe.memory.model_copy(update={"on_oom": "stop"}),
            "output": type(recipe.output)(),
        }
    )


def _same_memory(recipe: Recipe, system: str) -> bool:
    """Return whether a run needs the same memory on "linux" or "windows" as here.

    Torch has FlashAttention on Linux alone. Without it, packed rows have a mask; other rows need the same memory.
    """
    return recipe.data.rows != "packed" or flash_attention.is_built(system) == flash_attention.is_built()


def _categories(events: Sequence[Event], result: Replay) -> dict[str, int]:
    """Return category -> bytes at the peak; rounding to blocks counts as allocator waste."""
    sums: Counter[str] = Counter(dict.fromkeys([*CATEGORIES.values(), "temporaries"], 0))
    for storage in live_storages_at(events, result.peak_at):
        sums[plan_category(storage)] += storage.nbytes
    sums["allocator waste"] = result.peak_reserved_bytes - sum(sums.values())
    return dict(sums)


def _largest_tensors(storages: Sequence[Storage]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str], list[int]] = {}
    for storage in storages:
        groups.setdefault((plan_category(storage), _origin(storage)), []).append(storage.nbytes)
    tensors = [
        TensorGroup(nbytes=sum(sizes), count=len(sizes), category=category, origin=origin)
        for (category, origin), sizes in groups.items()
    ]
    return tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)[:MAX_LISTED_TENSORS])


def _origin(storage: Storage) -> str:
    """Return the operation and the module, with layer numbers replaced by `*` so that all layers form one group."""
    operation = storage.operation.removeprefix("aten.").partition(".")[0].lstrip("_")
    parts = ["*" if part.isdigit() else part for part in storage.module.split(".")]
    module = ".".join(part for part in parts if part not in ("base_model", "model", "transformer"))
    return f"{operation} in {module}" if module else operation
