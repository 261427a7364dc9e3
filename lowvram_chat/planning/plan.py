"""The plan of a recipe: what it will take of its card, when, for what, and whether it fits.

    plan(recipe).fits
    plan(recipe).on_card_bytes

The run is traced once (`recipe_step`), with a few lengths of row; its steps are then played in many orders
(`compose`), and the largest reserved peak of all is what counts.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lowvram_chat.gpus import CONTEXT_MIB, GPUS
from lowvram_chat.planning.replay import Replay, live_storages_at, replay
from lowvram_chat.planning.schedule import Lifetimes, Segment, compose_run
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.operations import Work
from lowvram_chat.tracing.recorder import Event, Storage
from lowvram_chat.tracing.run import RunTrace, trace_run
from lowvram_chat.tracing.training_loop import MicroBatchShape
from lowvram_chat.units import MIB

CUBLAS_WORKSPACE_BYTES = 8519680
"""Of one thread, below compute capability 9.0. Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `:4096:2:16:8`."""
SHUFFLED_RUNS, STEPS_PER_SHUFFLED_RUN = 3, 12
"""Orders of lengths that are tried, and the optimizer steps of each; 16 orders raised no shipped recipe's peak by more
than 2 MiB over the first one's."""
MAX_LISTED_TENSORS = 8
"""Tensors that a plan names."""

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
"""What the recorder calls a storage -> what a plan calls it; the rest is "temporaries"."""


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Storages of one origin that are there at the peak."""

    nbytes: int
    """All of them together."""
    count: int
    category: str
    origin: str
    """The operation, and the module it ran in."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe will take of its card. Bytes."""

    peak_allocated_bytes: int
    """`torch.cuda.max_memory_allocated`."""
    peak_reserved_bytes: int
    """`torch.cuda.max_memory_reserved`, over all orders of lengths tried."""
    longest_reserved_bytes: int
    """The same where every batch is of the longest rows."""
    context_bytes: int
    """What the CUDA context takes beside the allocator."""
    categories: Mapping[str, int]
    """Category -> bytes at the peak; together `on_card_bytes`."""
    phase: str
    """When in the step the peak stands: load, evaluation, forward, loss, backward, clipping or optimizer."""
    largest: tuple[TensorGroup, ...]
    """What makes the peak, the largest first."""
    parameters: int
    """Values of the whole model."""
    trained: int
    """Values that are trained."""
    limits: Mapping[str, int]
    """"linux", "windows" -> bytes of the card that this process may take, context included."""
    fits_on: Mapping[str, bool]
    """"linux", "windows" -> whether the run fits there."""
    work: Work = field(repr=False)
    """What an optimizer step of the longest rows asks of the card: a list of operations for each of its micro-batches (two
    at most), then that of the update. `speed.predict` makes a speed of it."""

    @property
    def on_card_bytes(self) -> int:
        """The peak as the card sees it, context included."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def system(self) -> str:
        """The operating system that the verdict is for: the one that plans."""
        return "windows" if sys.platform == "win32" else "linux"

    @property
    def fits(self) -> bool:
        """The verdict."""
        return self.fits_on[self.system]

    @property
    def limit_bytes(self) -> int:
        """What this process may take of the card, context included."""
        return self.limits[self.system]

    @property
    def spare_bytes(self) -> int:
        """What is left of the card; negative where the run does not fit."""
        return self.limit_bytes - self.on_card_bytes


def make_plan(recipe: Recipe) -> Plan:
    """Returns the plan of a recipe; a trace takes seconds, and is kept for the next call.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    asked = _memory_settings(recipe)
    return _cached_plan(_CacheKey(asked.model_dump_json(), asked))


def longest_rows_run(recipe: Recipe) -> list[Event]:
    """Returns the events of a run whose batches are all of the longest rows; raises as `make_plan`."""
    asked = _memory_settings(recipe)
    return next(_runs(_cached_trace(_CacheKey(asked.model_dump_json(), asked))))


def card_limits(recipe: Recipe) -> dict[str, int]:
    """Returns, for "linux" and "windows", the bytes of the card that the run may take, context included."""
    gpu, own = GPUS[recipe.memory.gpu], recipe.memory.limit_mib
    return {
        "linux": MIB * (gpu.usable_linux_mib if own is None else own),
        "windows": MIB * (gpu.usable_windows_mib if own is None else own),
    }


def traced_steps(recipe: Recipe) -> list[list[MicroBatchShape]]:
    """Returns the optimizer steps to trace: two of the longest rows, the others of shorter ones.

    More than two accumulated micro-batches add nothing: the second already finds gradients.
    """
    longest = recipe.data.max_length

    packed = recipe.data.rows == "packed"  # and so all of one length

    def shape(share: float, labelled: float = 1.0) -> MicroBatchShape:
        return MicroBatchShape(
            longest if packed else max(2, int(share * longest)), labelled * (share if packed else 1), packed
        )

    if recipe.train.gradient_accumulation_steps == 1:
        return [[shape(1)], [shape(1)], [shape(0.6, 0.7)], [shape(0.3)]]
    return [[shape(1), shape(0.6, 0.7)], [shape(1), shape(1)], [shape(0.3), shape(0.8, 0.4)]]


def card_rules(recipe: Recipe) -> CudaRules:
    """Returns the rules of the recipe's card."""
    capability = GPUS[recipe.memory.gpu].compute_capability
    return CudaRules(capability, cublas_workspace_bytes=CUBLAS_WORKSPACE_BYTES, plain_rows=True)


@dataclass(frozen=True)
class _CacheKey:
    """A recipe that can be remembered: equal where its words are."""

    words: str
    recipe: Recipe = field(compare=False)


@lru_cache(maxsize=1)
def _cached_trace(asked: _CacheKey) -> RunTrace:
    return trace_run(asked.recipe, card_rules(asked.recipe), traced_steps(asked.recipe))


@lru_cache(maxsize=64)
def _cached_plan(asked: _CacheKey) -> Plan:
    recipe, traced = asked.recipe, _cached_trace(asked)
    runs = list(_runs(traced))
    replays = [replay(events) for events in runs]
    worst = max(range(len(runs)), key=lambda number: replays[number].peak_reserved_bytes)
    card = card_limits(recipe)
    context = CONTEXT_MIB * MIB
    return Plan(
        peak_allocated_bytes=max(result.peak_allocated_bytes for result in replays),
        peak_reserved_bytes=replays[worst].peak_reserved_bytes,
        longest_reserved_bytes=replays[0].peak_reserved_bytes,
        context_bytes=context,
        categories=_categories(runs[worst], replays[worst]) | {"context": context},
        phase=runs[worst][replays[worst].peak_at].storage.phase,
        largest=_largest_tensors(live_storages_at(runs[worst], replays[worst].peak_at)),
        parameters=traced.parameters,
        trained=traced.trained,
        limits=card,
        fits_on={system: _fits(runs, replays, limit - context) for system, limit in card.items()},
        work=traced.work,
    )


def _memory_settings(recipe: Recipe) -> Recipe:
    """The recipe without what takes no memory on the card, so that a trace serves all that differ only there."""
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
                gradient_checkpointing=train.gradient_checkpointing,
                per_device_train_batch_size=train.per_device_train_batch_size,
                gradient_accumulation_steps=min(2, train.gradient_accumulation_steps),
                per_device_eval_batch_size=train.per_device_eval_batch_size if evaluates else 1,
            ),
            "memory": type(recipe.memory)(gpu=recipe.memory.gpu, limit_mib=recipe.memory.limit_mib),
            "output": type(recipe.output)(),
        }
    )


def _runs(traced: RunTrace) -> Iterator[list[Event]]:
    """Yields runs: all batches of the longest rows; then shuffled lengths, with an evaluation midway and at the end."""
    lifetimes = Lifetimes(traced.events)
    before = traced.events[: traced.steps[0][1]]
    handed_on = Segment(traced.events, (0, len(before)), lifetimes).outgoing
    longest, *others = (Segment(traced.events, span, lifetimes, steady=True) for span in traced.steps[1:])
    pause = [Segment(traced.events, traced.evaluation, lifetimes)] if traced.evaluation else []
    yield compose_run(before, handed_on, [longest, *pause, longest, *pause])
    yield compose_run(_resumed(before, traced.steps[0][0]), handed_on, [longest, *pause])
    for seed in range(SHUFFLED_RUNS):
        order = random.Random(seed).choices([longest, *others], k=STEPS_PER_SHUFFLED_RUN)
        half = STEPS_PER_SHUFFLED_RUN // 2
        yield compose_run(before, handed_on, [longest, *order[:half], *pause, *order[half:], longest, *pause])


def _resumed(before: Sequence[Event], first_step: int) -> list[Event]:
    """A run up to its first optimizer step, where a checkpoint gave the optimizer its states before that step.

    Source: transformers/trainer.py, `_load_optimizer_and_scheduler`: read on the host, then put where the weights are.
    """
    loaded: list[Event] = []
    others: list[Event] = []
    for event in before[first_step:]:
        (loaded if event.storage.category == "optimizer state" else others).append(event)
    return [*before[:first_step], *loaded, *others]


def _fits(runs: Sequence[Sequence[Event]], replays: Sequence[Replay], limit_bytes: int) -> bool:
    """Whether every run gets through, the allocator giving back what it only keeps where it must."""
    return all(
        result.peak_reserved_bytes <= limit_bytes or replay(events, limit_bytes).out_of_memory_at is None
        for events, result in zip(runs, replays, strict=True)
    )


def plan_category(storage: Storage) -> str:
    """Returns a plan's word for what a storage is for."""
    return CATEGORIES.get(storage.category, "temporaries")


def _categories(events: Sequence[Event], result: Replay) -> dict[str, int]:
    sums: Counter[str] = Counter(dict.fromkeys([*CATEGORIES.values(), "temporaries"], 0))
    for storage in live_storages_at(events, result.peak_at):
        sums[plan_category(storage)] += storage.nbytes
    # Rounding to blocks counts as waste too.
    sums["allocator waste"] = result.peak_reserved_bytes - sum(sums.values())
    return dict(sums)


def _largest_tensors(alive: Sequence[Storage]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str], list[int]] = {}
    for storage in alive:
        key = plan_category(storage), _origin(storage)
        groups.setdefault(key, []).append(storage.nbytes)
    tensors = [
        TensorGroup(nbytes=sum(sizes), count=len(sizes), category=category, origin=origin)
        for (category, origin), sizes in groups.items()
    ]
    return tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)[:MAX_LISTED_TENSORS])


def _origin(storage: Storage) -> str:
    """The operation and the module, layer numbers left out: what all layers hold counts as one."""
    operation = storage.operation.removeprefix("aten.").partition(".")[0].lstrip("_")
    parts = ["*" if part.isdigit() else part for part in storage.module.split(".")]
    module = ".".join(part for part in parts if part not in ("base_model", "model", "transformer"))
    return f"{operation} in {module}" if module else operation
