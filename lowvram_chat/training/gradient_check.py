"""Compares the gradients of a training step with those of plain autograd, once, before the first step.

The step is the trainer's own: two micro-batches, counted and scaled as in training, with the fused loss and the fused adapters.
Plain autograd goes through all logits and PEFT's own layers. A gradient that is scaled twice, cut off or not there would train a
model to nothing without an error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from lowvram_chat.data.rows import IGNORED_LABEL, Collator, TokenRow
from lowvram_chat.errors import SubstitutionError
from lowvram_chat.model.compared_parameters import Parameters, compared_parameters
from lowvram_chat.model.compilation import uncompiled
from lowvram_chat.model.fused_lora import always_folded, unfused
from lowvram_chat.model.scoring import autocast
from lowvram_chat.training.callbacks import TokenCounts
from lowvram_chat.training.probe_documents import first_documents, is_packed, rows_of
from lowvram_chat.units import largest

if TYPE_CHECKING:
    from lowvram_chat.training.trainer import ChatTrainer

log = logging.getLogger(__name__)

FP32_TOLERANCE = 2e-3
HALF_TOLERANCE = 0.1
"""Largest accepted norm of the difference, relative to the norm of the expected gradient.

Measured on a CPU for GPT-2, Llama, Gemma-2 and Granite, full and LoRA: at most 5e-6 in fp32 and 2e-2 under bf16 autocast. A
factor of two gives 1, one labelled token too many in the divisor at least 0.02."""
MAX_NOISE = 0.24
"""Most noise that counts, so that a factor of two (a difference of 1 or 0.5) is refused whatever the noise is."""
NEGLIGIBLE = 1e-12
"""Norm below which a gradient is zero: that of an adapter's A while its B is still zero."""


def check_gradients(trainer: ChatTrainer) -> None:
    """Refuse a trainer whose gradients are not those of the mean cross-entropy of the labelled tokens.

    Compared are the head, the first and the last block, as far as they are trained, on at most 2 conversations of 32 tokens.
    Gradients, random states, training modes and counts are as before.

    Raises:
        SubstitutionError: they differ by more than the tolerance.
    """
    with _without_dropout(trainer):
        differences = _differences(trainer)
    tolerance = FP32_TOLERANCE if _in_float32(trainer) else HALF_TOLERANCE
    for name, (difference, noise) in differences.items():
        if not difference <= max(tolerance, 2 * noise):  # NaN, too
            raise SubstitutionError(
                f"the gradient of {name} in a training step differs from that of plain autograd by {difference:.1e} of its size "
                f"(tested on this model); at most {tolerance:g} is allowed. Set model.fused_loss=false and adapter.fused=false."
            )


def _differences(trainer: ChatTrainer) -> dict[str, tuple[float, float]]:
    """Return the relative difference of the gradients of each group, and their noise; empty where they cannot be compared.

    The noise is how far plain autograd in half precision is from itself in a batch of another shape, where routers may choose
    other experts, and from fp32: the gradients of a model that knows its data by heart are rounding errors. It is 0 where the
    difference is small.
    """
    groups = {name: group for name, group in compared_parameters(trainer.trained_model).items() if group}
    documents = first_documents(trainer)
    expected = _plain_gradients(trainer, [[document] for document in documents], groups)
    actual = _trainer_gradients(trainer, documents, groups)
    if trainer.precision == "fp16" and not _are_finite(actual):
        log.info(
            "the gradients overflow at the scaler's first scale, which training lowers by itself; they were not compared"
        )
        return {}
    differences = {name: _relative_difference(actual[name], expected[name]) for name in groups}
    if _in_float32(trainer) or largest(differences.values()) <= HALF_TOLERANCE:
        return {name: (difference, 0.0) for name, difference in differences.items()}
    others = [_plain_gradients(trainer, [documents], groups)]
    with contextlib.suppress(RuntimeError):  # a base in half precision has no products in fp32
        others.append(_plain_gradients(trainer, [[document] for document in documents], groups, precision="fp32"))
    noise = {name: largest(_relative_difference(other[name], expected[name]) for other in others) for name in groups}
    return {name: (difference, min(noise[name], MAX_NOISE)) for name, difference in differences.items()}


def _in_float32(trainer: ChatTrainer) -> bool:
    parameters = trainer.trained_model.parameters()
    return trainer.precision == "fp32" and all(parameter.dtype == torch.float32 for parameter in parameters)


@contextlib.contextmanager
def _without_dropout(trainer: ChatTrainer) -> Iterator[None]:
    """Hold the model in evaluation mode, against the training step's own wish; restore modes, gradients, counts and states."""
    model, counts, device = trainer.trained_model, trainer.counts, trainer.args.device
    modes = [(module, module.training) for module in model.modules()]
    trainer.counts = TokenCounts()
    model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), uncompiled(model):
            yield
    finally:
        del model.train  # the class's own is back
        trainer.counts = counts
        model.zero_grad(set_to_none=True)
        for module, training in modes:
            module.training = training
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _trainer_gradients(
    trainer: ChatTrainer, documents: Sequence[TokenRow], groups: Mapping[str, Parameters]
) -> dict[str, list[torch.Tensor]]:
    """Return the gradients that the trainer's own step accumulates over these conversations."""
    model, device = trainer.trained_model, trainer.args.device
    rows = rows_of(trainer, documents)
    micro_batches = [rows] if is_packed(trainer) else [[row] for row in rows]
    batches, labelled = trainer.get_batch_samples(
        iter(map(trainer.held_out_collator, micro_batches)), len(micro_batches), device
    )
    with always_folded(), _as_prepared(trainer):
        for batch in batches:
            trainer.training_step(model, batch, num_items_in_batch=labelled)  # type: ignore[no-untyped-call]
    scaler = trainer.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
    return {name: [_gradient(p) / scale for p in group.values()] for name, group in groups.items()}


@contextlib.contextmanager
def _as_prepared(trainer: ChatTrainer) -> Iterator[None]:
    """Let the trainer's steps compute their losses in the run's precision, as accelerate does once training begins."""

    def in_precision() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(autocast(trainer.args.device.type, trainer.precision))
        return stack

    trainer.compute_loss_context_manager = in_precision  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer.compute_loss_context_manager  # the class's own is back


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _plain_gradients(
    trainer: ChatTrainer,
    batches: Sequence[Sequence[TokenRow]],
    groups: Mapping[str, Parameters],
    *,
    precision: str | None = None,
) -> dict[str, list[torch.Tensor]]:
    """Return the gradients of the mean cross-entropy over batches of conversations, from all of their logits.

    `precision` takes the place of the run's own.
    """
    model, device = trainer.trained_model, trainer.args.device
    parameters = list(dict.fromkeys(itertools.chain.from_iterable(group.values() for group in groups.values())))
    total = sum(document.loss_tokens for documents in batches for document in documents)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for documents in batches:
        rows = [{"input_ids": document.input_ids, "labels": document.labels} for document in documents]
        batch = Collator(0)(rows)
        with unfused(model):
            with autocast(device.type, precision or trainer.precision):
                logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits
            targets = batch["labels"][:, 1:].flatten().to(device)
            shifted = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(shifted, targets, ignore_index=IGNORED_LABEL, reduction="sum") / total
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sum_of_all, gradient in zip(sums, gradients, strict=True):
            sum_of_all.add_(0 if gradient is None else gradient)
    found = dict(zip(map(id, parameters), sums, strict=True))
    return {name: [found[id(parameter)] for parameter in group.values()] for name, group in groups.items()}


def _are_finite(gradients: Mapping[str, Sequence[torch.Tensor]]) -> bool:
    return all(bool(gradient.isfinite().all()) for group in gradients.values() for gradient in group)


def _relative_difference(gradients: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference, relative to the norm of the expected gradients of a group."""
    difference = math.hypot(*((one - other).norm().item() for one, other in zip(gradients, expected, strict=True)))
    size = math.hypot(*(gradient.norm().item() for gradient in expected))
    return 0.0 if difference < NEGLIGIBLE else difference / max(size, NEGLIGIBLE)
