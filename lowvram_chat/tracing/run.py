"""Traces the run of a recipe: loading the model, preflight, evaluation, optimizer steps, saving."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch

from lowvram_chat.model import loss as loss_module
from lowvram_chat.model.adapters import base_model_of
from lowvram_chat.model.document_mask import use_attention_by_document
from lowvram_chat.model.varlen_attention import VARLEN_ATTENTION
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing.materialise import Materialised, materialise
from lowvram_chat.tracing.model import build_meta_model
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.optimizer import HOST_MEMORY, prepare_optimizer
from lowvram_chat.tracing.patching import patched
from lowvram_chat.tracing.recorder import Event, Span, TraceRecorder
from lowvram_chat.tracing.rules import DeviceRules
from lowvram_chat.tracing.training_loop import MicroBatchShape, TracedRun

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunTrace:
    """The trace of a recipe's run."""

    events: list[Event]
    """Every allocation and free, starting with the loading of the model."""
    evaluation: Span | None
    """The evaluation, if the recipe has one."""
    steps: list[Span]
    """The optimizer steps. The first one allocates the optimizer states."""
    parameters: int
    """Number of parameters of the whole model (4-bit ones too)."""
    trained: int
    """Number of trained parameters."""
    paged_bytes: int
    """Optimizer states in CUDA unified memory, which no allocation of the trace stands for."""
    work: list[list[Operation]]
    """The operations of the step `LISTED_STEP`: a list for each micro-batch, and one for the optimizer's update."""


def trace_run(
    recipe: Recipe, rules: DeviceRules, steps: Sequence[Sequence[MicroBatchShape]], *, on_cpu: bool = False
) -> RunTrace:
    """Return the trace of a run of these optimizer steps, each a list of micro-batches.

    `on_cpu`: with the variants that are fastest on a CPU.

    Raises:
        NotFoundError, ModelError: the model or its adapter is not available.
    """
    with _no_garbage_collection(), _readable_4bit_weights(recipe):
        return _trace(recipe, rules, steps, on_cpu=on_cpu)


def _trace(recipe: Recipe, rules: DeviceRules, steps: Sequence[Sequence[MicroBatchShape]], *, on_cpu: bool) -> RunTrace:
    """Return the trace, in an environment that `trace_run` has prepared."""
    model = build_meta_model(recipe, on_cpu=on_cpu)
    if recipe.data.rows == "packed" and rules.has_varlen_attention(recipe, model.config):
        use_attention_by_document(base_model_of(model), VARLEN_ATTENTION)
    make_optimizer = prepare_optimizer(recipe, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with TraceRecorder(rules) as recorder, _loss_phase(recorder):
        moved = _load(recipe, model, recorder)
        run = TracedRun(recipe, model, make_optimizer(moved), recorder)
        run.check()
        run.preflight()
        evaluation = run.evaluate()
        run.begin()
        spans = run.train(steps)
        run.save()
    paged = {event.storage for event in recorder.events if event.storage.category == HOST_MEMORY}
    paged_bytes = sum(storage.nbytes for storage in paged)
    trace = RunTrace(recorder.events, evaluation, spans, parameters, trained, paged_bytes, run.work)
    return _without_host_storages(trace)


def _without_host_storages(trace: RunTrace) -> RunTrace:
    """Return the trace without storages that are not in the device's memory."""
    is_kept = [event.storage.category != HOST_MEMORY for event in trace.events]
    new_index = [0, *itertools.accumulate(is_kept)]
    return replace(
        trace,
        events=list(itertools.compress(trace.events, is_kept)),
        evaluation=trace.evaluation and (new_index[trace.evaluation[0]], new_index[trace.evaluation[1]]),
        steps=[(new_index[start], new_index[end]) for start, end in trace.steps],
    )


def _load(recipe: Recipe, model: torch.nn.Module, recorder: TraceRecorder) -> Materialised:
    """Move the model to the traced device, with the allocations of its way of loading."""
    if recipe.model.load_in != "4bit":
        return materialise(model, recorder)
    from lowvram_chat.tracing.four_bit import label_scales, load_onto_device, record_loading_warmup, shrink_weights

    shapes = shrink_weights(model)
    record_loading_warmup(model, recorder)
    moved = materialise(model, recorder, load_onto_device(model, shapes))
    label_scales(shapes, recorder)
    return moved


def _readable_4bit_weights(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """Return a context in which DoRA can read fake 4-bit weights, if the recipe has any."""
    if recipe.model.load_in != "4bit":
        return contextlib.nullcontext()
    from lowvram_chat.tracing.four_bit import dora_reads_fake_weights

    return dora_reads_fake_weights()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Free storages by reference counts alone: the same in every trace, and in four fifths of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loss_phase(recorder: TraceRecorder) -> contextlib.AbstractContextManager[None]:
    """Return a context in which allocations of the loss function belong to the phase "loss"."""
    return patched(loss_module, summed_loss=_in_phase(recorder, "loss", loss_module.summed_loss))


def _in_phase(
    recorder: TraceRecorder, phase: str, function: Callable[Parameters, Result]
) -> Callable[Parameters, Result]:
    """Return the function, with its allocations assigned to a phase."""

    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with recorder.phase(phase):
            return function(*args, **kwargs)

    return wrapper
