"""The training loop that is traced: preflight, evaluation, optimizer steps and saving.

It is the loop of transformers' Trainer, with accelerate around the model. It is written out here because it must run on
fake tensors, without data, and because this layer does not import `training`. A test compares it with the Trainer. Local
variables live as long as the Trainer's, since a tensor is freed when its last name goes.
Source: transformers/trainer.py, `_run_epoch`, `training_step`; accelerate/accelerator.py, `prepare_model`, `backward`,
`clip_grad_norm_`; accelerate/optimizer.py, `AcceleratedOptimizer.step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lowvram_chat.data.packing import documents_at_once
from lowvram_chat.model.adapters import ChatModel
from lowvram_chat.model.compared_parameters import compared_parameters
from lowvram_chat.model.fused_lora import unfused
from lowvram_chat.model.isolation import sees_later_tokens
from lowvram_chat.model.scoring import autocast, score
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.optimizer import label_states
from lowvram_chat.tracing.recorder import Span, TraceRecorder

CHECKED_ROWS, CHECKED_TOKENS = 2, 32
"""Conversations on which a run is checked, and their tokens, as in `training.probe_documents`."""

Batch = dict[str, Any]

LISTED_STEP = 1
"""Index of the step whose operations are listed: the second, in which the optimizer states exist."""


@dataclass(frozen=True)
class MicroBatchShape:
    """Shape of a micro-batch."""

    length: int
    """Tokens of its longest row."""
    labelled: float = 1.0
    """Share of its tokens that carry loss."""
    packed: bool = False
    """Whether a row holds several documents, so that its positions restart."""


class NullRecorder(TraceRecorder):
    """Records nothing, because it is never entered."""

    def label(self, tensors: Iterable[object], category: str) -> None:
        """Do nothing."""

    def record_cache_release(self) -> None:
        """Do nothing."""


class TracedRun:
    """A run on the traced device, or a real run if there is no recorder. Its attributes live until its end."""

    def __init__(
        self,
        recipe: Recipe,
        model: ChatModel,
        optimizer: torch.optim.Optimizer,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.recipe, self.model, self.optimizer, self.recorder = recipe, model, optimizer, recorder or NullRecorder()
        self.scaler = torch.amp.GradScaler("cpu") if recipe.train.precision == "fp16" else None
        self.total_loss = torch.zeros(())
        self.work: list[list[Operation]] = []
        """The operations of step `LISTED_STEP`: a list for each micro-batch, and one for the update."""

    def check(self) -> None:
        """Run what the checks before a run leave in the allocator: the workspaces of cuBLAS, in segments of odd sizes.

        The loss of a few short rows comes first, in evaluation mode, and then the gradients of one of them by plain autograd. The
        allocator returns the other segments after each check, as in `training.loss_check` and `training.gradient_check`. The rest
        of these checks leaves nothing behind.
        """
        rows = min(CHECKED_ROWS, self.recipe.train.per_device_train_batch_size)
        batch = self._batch(MicroBatchShape(min(CHECKED_TOKENS, self.recipe.data.max_length // CHECKED_ROWS)), rows)
        self.model.eval()
        with self.recorder.phase("checks"):
            if self.recipe.model.load_in == "4bit":  # others are still on the host then
                sees_later_tokens(self.model)
            with torch.no_grad(), autocast("cpu", self.recipe.train.precision):
                self.model(**batch)
            self.recorder.record_cache_release()
            self._plain_gradients(batch["input_ids"][:1])
        self.model.train()
        del batch
        self.recorder.record_cache_release()

    def _plain_gradients(self, ids: torch.Tensor) -> None:
        """Compute the gradients of a row (1, T) from its logits, as `training.gradient_check` does first."""
        groups = compared_parameters(self.model).values()
        parameters = list(dict.fromkeys(parameter for group in groups for parameter in group.values()))
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        with unfused(self.model):
            with autocast("cpu", self.recipe.train.precision):
                logits = self.model(input_ids=ids, use_cache=False).logits
            shifted = logits[:, :-1].flatten(0, 1).float()
            loss = functional.cross_entropy(shifted, ids[0, 1:], reduction="sum") / ids.numel()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        del sums, gradients

    def preflight(self) -> None:
        """Run the longest batch once before anything else and free its gradients, as `training.preflight` does."""
        batch = self._batch(MicroBatchShape(self.recipe.data.max_length, packed=self.recipe.data.rows == "packed"))
        self._micro_batch(batch, batch["loss_positions"].numel(), scaled=False)
        self.model.zero_grad()

    def begin(self) -> None:
        """Start the training: accelerate releases what it has held, and the allocator's cache with it.

        Source: transformers/trainer.py, `_inner_training_loop`; accelerate/accelerator.py, `free_memory`.
        """
        self.recorder.record_cache_release()

    def evaluate(self) -> Span | None:
        """Score one batch of the longest rows, if the recipe evaluates."""
        data, rows = self.recipe.data, self.recipe.train.per_device_eval_batch_size
        if data.eval_source is None and data.eval_split is None and data.eval_fraction is None:
            return None
        start = len(self.recorder.events)
        row = {"input_ids": range(data.max_length)}
        with self.recorder.phase("evaluation"):
            score(self.model, [row] * rows, self._collate, rows, self.recipe.train.precision)
        return start, len(self.recorder.events)

    def train(self, steps: Sequence[Sequence[MicroBatchShape]]) -> list[Span]:
        """Run the optimizer steps; `batches`, `inputs` and the rest live as in the Trainer's `_run_epoch`."""
        spans = []
        for index, shapes in enumerate(steps):
            start = len(self.recorder.events)
            batches = [self._batch(shape) for shape in shapes]
            tokens = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches)
            for inputs in batches:
                self._start_listing(index)
                loss = self._micro_batch(inputs, tokens)
                self.total_loss += loss
            self._start_listing(index)
            norm = self._update()  # noqa: F841  (lives until the next step, as in the Trainer)
            self.recorder.operations = None
            spans.append((start, len(self.recorder.events)))
        return spans

    def save(self) -> None:
        """Gather what a checkpoint writes. All of it exists already, and is copied to the host piece by piece.

        A merge needs no memory on the device either, because `merge` runs on the CPU.
        """
        with self.recorder.phase("saving"):
            checkpoint = _checkpointed_weights(self.model, self.recipe), self.optimizer.state_dict()
            del checkpoint

    def _start_listing(self, step: int) -> None:
        """Start a new list of operations, if this is the step whose operations are listed."""
        if step == LISTED_STEP:
            self.recorder.operations = []
            self.work.append(self.recorder.operations)

    def _collate(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Return an evaluation batch."""
        return self._batch(MicroBatchShape(len(rows[0]["input_ids"])), len(rows))

    def _batch(self, shape: MicroBatchShape, rows: int | None = None) -> Batch:
        """Return a batch like `data.rows.Collator`'s, in which every token but a row's first can carry loss."""
        rows = rows or self.recipe.train.per_device_train_batch_size
        loss_tokens = max(1, int(rows * (shape.length - 1) * shape.labelled))
        batch: Batch = {
            "input_ids": torch.zeros(rows, shape.length, dtype=torch.int64),
            "labels": torch.zeros(rows, shape.length, dtype=torch.int64),
            "loss_positions": torch.arange(loss_tokens),
        }
        if shape.packed:
            batch["position_ids"] = torch.arange(shape.length).remainder_(max(1, shape.length // 2)).repeat(rows, 1)
            ends = torch.arange(documents_at_once(rows, shape.length) + 1, dtype=torch.int32)
            self.recorder.label([ends], "batch")
            batch["document_groups"] = ((rows * shape.length, ends),)
        if self.recipe.data.attention_mask:
            batch["attention_mask"] = torch.ones(rows, shape.length, dtype=torch.int64)
        self.recorder.label(batch.values(), "batch")
        return batch

    def _micro_batch(self, inputs: Batch, tokens: torch.Tensor | int, *, scaled: bool = True) -> torch.Tensor:
        """Run the Trainer's `training_step` with `ChatTrainer.compute_loss`; return the detached loss ()."""
        with self.recorder.phase("forward"), autocast("cpu", self.recipe.train.precision):
            output = self.model(**inputs)
        loss: torch.Tensor = output["loss"] * 1 / tokens  # one process
        del output
        with self.recorder.phase("backward"):
            (self.scaler.scale(loss) if self.scaler and scaled else loss).backward()
            self.recorder.label((p.grad for p in self.model.parameters()), "gradients")
        return loss.detach()

    def _update(self) -> torch.Tensor:
        """Clip gradients, update parameters and free the gradients; return the norm of the gradients ()."""
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
            label_states(self.optimizer, self.recipe, self.recorder)
        self.model.zero_grad()
        return norm


def _checkpointed_weights(model: torch.nn.Module, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of the model."""
    if recipe.adapter is None:
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
