"""A recipe, traced: load, evaluation, optimizer steps, evaluation, with names that live as long as the Trainer's do.

The loop is that of transformers' Trainer with accelerate around the model; it is written out because it must run on
fake tensors, without data, and because this layer does not know `train`. A test holds it against the real one.
Source: transformers/trainer.py, `_run_epoch`, `training_step`; accelerate/accelerator.py, `prepare_model`, `backward`,
`clip_grad_norm_`; accelerate/optimizer.py, `AcceleratedOptimizer.step`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowvram_chat.model import loss as loss_module
from lowvram_chat.model.scoring import autocast, score
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing import optimizer as recipe_optimizer
from lowvram_chat.tracing.materialise import Materialised, materialise
from lowvram_chat.tracing.model import build_meta_model
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.recorder import Event, Span, TraceRecorder
from lowvram_chat.tracing.rules import DeviceRules

Batch = dict[str, torch.Tensor]

LISTED_STEP = 1
"""The step whose operations are listed: the second, where the optimizer has its states."""


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch: its longest row, and the share of its tokens that carry loss."""

    length: int
    labelled: float = 1.0
    packed: bool = False
    """Whether a row holds several documents, so that its positions restart."""


@dataclass(frozen=True)
class RunTrace:
    """What a recipe's run does to memory."""

    events: list[Event]
    """Every birth and death, from loading the model on."""
    evaluation: Span | None
    """The evaluation, where the recipe has one."""
    steps: list[Span]
    """The optimizer steps; the first one makes the optimizer's states."""
    parameters: int
    """Values of the whole model (4-bit ones too)."""
    trained: int
    """Values that are trained."""
    work: list[list[Operation]]
    """The operations of the step `LISTED_STEP`: a list for each micro-batch, and one for the optimizer's update."""


def trace_run(recipe: Recipe, rules: DeviceRules, steps: Sequence[Sequence[MicroBatchShape]]) -> RunTrace:
    """Returns the trace of a run of these optimizer steps, each a list of micro-batches.

    Raises:
        NotFoundError, ModelError: the model or its adapter cannot be had.
    """
    with _no_garbage_collection(), _four_bit_readable(recipe):
        return _trace(recipe, rules, steps)


def _trace(recipe: Recipe, rules: DeviceRules, steps: Sequence[Sequence[MicroBatchShape]]) -> RunTrace:
    model = build_meta_model(recipe)
    make_optimizer = recipe_optimizer.prepare_optimizer(recipe, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with TraceRecorder(rules) as recorder, _loss_phase_marked(recorder):
        moved = _load(recipe, model, recorder)
        run = TracedRun(recipe, model, make_optimizer(moved), recorder)
        run.rehearse()
        evaluation = run.evaluate()
        places = run.train(steps)
        run.save()
    return _without_host_storages(RunTrace(recorder.events, evaluation, places, parameters, trained, run.work))


def _without_host_storages(trace: RunTrace) -> RunTrace:
    """The trace without storages that the card never holds."""
    kept = [event.storage.category != recipe_optimizer.HOST_MEMORY for event in trace.events]
    place = [0, *itertools.accumulate(kept)]
    return replace(
        trace,
        events=list(itertools.compress(trace.events, kept)),
        evaluation=trace.evaluation and (place[trace.evaluation[0]], place[trace.evaluation[1]]),
        steps=[(place[start], place[end]) for start, end in trace.steps],
    )


def _load(recipe: Recipe, model: torch.nn.Module, recorder: TraceRecorder) -> Materialised:
    """Moves the model onto the traced card, by the way that its weights take."""
    if recipe.model.load_in != "4bit":
        return materialise(model, recorder)
    from lowvram_chat.tracing.four_bit import add_scales, record_loading_warmup, shrink_weights

    shapes = shrink_weights(model)
    record_loading_warmup(model, recorder)
    moved = materialise(model, recorder)
    add_scales(shapes, recorder)
    return moved


class NullRecorder(TraceRecorder):
    """Records nothing: it is never entered."""

    def label(self, tensors: Iterable[object], category: str) -> None:
        """Does nothing."""


class TracedRun:
    """The run itself, on the traced card, or for real where there is no recorder; what it holds lives to its end."""

    def __init__(
        self, recipe: Recipe, model: Any, optimizer: torch.optim.Optimizer, recorder: TraceRecorder | None = None
    ) -> None:
        self.recipe, self.model, self.optimizer, self.recorder = recipe, model, optimizer, recorder or NullRecorder()
        self.scaler = torch.amp.GradScaler("cpu") if recipe.train.precision == "fp16" else None
        self.total_loss = torch.zeros(())
        self.work: list[list[Operation]] = []

    def train(self, steps: Sequence[Sequence[MicroBatchShape]]) -> list[Span]:
        """Runs the optimizer steps; `batches`, `inputs` and the rest live as in the Trainer's `_run_epoch`."""
        places = []
        for number, shapes in enumerate(steps):
            start = len(self.recorder.events)
            batches = [self._batch(shape) for shape in shapes]
            tokens = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches)
            for inputs in batches:
                self._list_from_here(number)
                loss = self._micro_batch(inputs, tokens)
                self.total_loss += loss
            self._list_from_here(number)
            norm = self._update()  # noqa: F841  (lives until the next step, as in the Trainer)
            self.recorder.operations = None
            places.append((start, len(self.recorder.events)))
        return places

    def rehearse(self) -> None:
        """Runs the longest batch once before all else and lets its gradients go, as `train.rehearsal` does."""
        batch = self._batch(MicroBatchShape(self.recipe.data.max_length, packed=self.recipe.data.rows == "packed"))
        self._micro_batch(batch, batch["loss_positions"].numel(), scaled=False)
        self.model.zero_grad()

    def save(self) -> None:
        """Gathers what a checkpoint writes: all of it is there already, and goes to the host piece by piece.

        A merge takes nothing either: `merge` runs on the CPU.
        """
        with self.recorder.phase("saving"):
            held = _checkpointed_weights(self.model, self.recipe), self.optimizer.state_dict()
            del held

    def _list_from_here(self, number: int) -> None:
        """Begins a part of the work, in the step whose operations are listed."""
        if number == LISTED_STEP:
            self.recorder.operations = []
            self.work.append(self.recorder.operations)

    def evaluate(self) -> Span | None:
        """Scores one batch of the longest rows, where the recipe evaluates."""
        data, rows = self.recipe.data, self.recipe.train.per_device_eval_batch_size
        if data.eval_source is None and data.eval_split is None and data.eval_fraction is None:
            return None
        start = len(self.recorder.events)
        row = {"input_ids": range(data.max_length)}
        with self.recorder.phase("evaluation"):
            score(self.model, [row] * rows, self._collate, rows, self.recipe.train.precision)  # type: ignore[arg-type]
        return start, len(self.recorder.events)

    def _collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        return self._batch(MicroBatchShape(len(rows[0]["input_ids"])), len(rows))

    def _batch(self, shape: MicroBatchShape, rows: int | None = None) -> Batch:
        """A batch as `data.rows.Collator` makes it; every token but a row's first can carry loss."""
        rows = rows or self.recipe.train.per_device_train_batch_size
        places = max(1, int(rows * (shape.length - 1) * shape.labelled))
        batch = {
            "input_ids": torch.zeros(rows, shape.length, dtype=torch.int64),
            "labels": torch.zeros(rows, shape.length, dtype=torch.int64),
            "loss_positions": torch.arange(places),
        }
        if shape.packed:
            batch["position_ids"] = torch.arange(shape.length).remainder_(max(1, shape.length // 2)).repeat(rows, 1)
        if self.recipe.data.attention_mask:
            batch["attention_mask"] = torch.ones(rows, shape.length, dtype=torch.int64)
        self.recorder.label(batch.values(), "batch")
        return batch

    def _micro_batch(self, inputs: Batch, tokens: Any, *, scaled: bool = True) -> torch.Tensor:
        """The Trainer's `training_step` with `ChatTrainer.compute_loss`; returns the detached loss ()."""
        with self.recorder.phase("forward"), autocast("cpu", self.recipe.train.precision):
            output = self.model(**inputs)
        loss: torch.Tensor = output["loss"] * 1 / tokens  # one process
        del output
        with self.recorder.phase("backward"):
            (self.scaler.scale(loss) if self.scaler and scaled else loss).backward()  # type: ignore[no-untyped-call]
            self.recorder.label((p.grad for p in self.model.parameters()), "gradients")
        return loss.detach()

    def _update(self) -> torch.Tensor:
        """Clips, steps, lets the gradients go; returns the gradients' norm ()."""
        with self.recorder.phase("clipping"):
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            limit = self.recipe.train.max_grad_norm or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        with self.recorder.phase("optimizer"):
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            recipe_optimizer.label_states(self.optimizer, self.recipe, self.recorder)
        self.model.zero_grad()
        return norm


def _checkpointed_weights(model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model."""
    if recipe.adapter is None:
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _four_bit_readable(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    if recipe.model.load_in != "4bit":
        return contextlib.nullcontext()
    from lowvram_chat.tracing.four_bit import dora_reads_fake_weights

    return dora_reads_fake_weights()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Lets deaths come from reference counts alone, the same in every trace, and in four fifths of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _loss_phase_marked(recorder: TraceRecorder) -> Iterator[None]:
    """Lets what the loss function allocates count as "loss"."""
    plain = loss_module.summed_loss

    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with recorder.phase("loss"):
            return plain(*args, **kwargs)

    module: Any = loss_module
    module.summed_loss = marked
    try:
        yield
    finally:
        module.summed_loss = plain
