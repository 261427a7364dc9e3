"""Compares the trainer's loss with the model's own logits, once, when the trainer is built.

A trainer may replace `model.forward`, count tokens in another way, or divide a loss that is a mean already. A run then
trains on a wrong loss without an error. TRL 1.10 to 1.14 did so by default: their `loss_type="chunked_nll"` logged 0.0595
where the loss was 6.7837.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from importlib import metadata

import torch
from torch.nn import functional as F

from lowvram_chat.data.rows import IGNORED_LABEL, TokenRow, on_device
from lowvram_chat.errors import SubstitutionError
from lowvram_chat.model.compilation import uncompiled
from lowvram_chat.model.scoring import autocast
from lowvram_chat.training.callbacks import TokenCounts
from lowvram_chat.training.probe_documents import CheckedTrainer, first_documents, rows_of

LOGIT_ROWS = 8
"""Rows of logits (V,) that are converted to float32 at a time."""
FP32_TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-3
"""Largest accepted difference, relative to the expected loss or to 1 nat, whichever is larger.

Measured on a CPU over 25 micro-batches of each kind of run: 1.9e-7 in fp32, 1.7e-7 under fp16 and bf16 autocast, and 1.2e-5
with a bfloat16 base, whose kernels round differently in batches of another shape. As an upper bound, autocast as a whole
moves the loss by 9.4e-5 (fp16) and 8.9e-4 (bf16). `HALF_TOLERANCE` leaves room for that, since GPU kernels were not measured.
One labelled token too many or too few in the divisor moves the loss by at least 1.5 %, since a conversation has at most 31
labelled tokens here."""


def check_trainer_loss(trainer: CheckedTrainer) -> None:
    """Refuse a trainer whose loss is not the mean cross-entropy of the labelled tokens.

    The loss of one micro-batch of training rows is computed as in a training step: the batch's labelled tokens are counted
    by `trainer.get_batch_samples`, and `trainer.compute_loss` runs under the run's autocast. The expected loss is computed
    without the fused loss, from the logits of each conversation alone, without padding or packing, and summed in float32.
    Blocks that are compiled run as written, and dropout is off.

    The micro-batch has at most 2 conversations of 32 tokens, and no more rows than a training micro-batch. No activation is
    kept for a backward pass. The largest tensor is the logits (32, V) of one conversation: 6 MiB of a GPT-2, less than the
    activations of a training step of 80 tokens. The planned peak is therefore not exceeded. On CUDA the cached segments are
    released afterwards: left in the cache, they raised the reserved peak of `lora_fp16` by 20 MiB. Random states, training modes,
    gradients and token counts are as before.

    Raises:
        SubstitutionError: the losses differ by more than the tolerance.
    """
    documents = first_documents(trainer)
    with _as_evaluated(trainer):
        actual = _trainer_loss(trainer, documents)
        expected = sum(_summed_cross_entropy(trainer, document) for document in documents)
    expected /= sum(document.loss_tokens for document in documents)
    if not math.isfinite(expected):  # the weights, or half precision; there is nothing to compare with
        return
    difference = abs(actual - expected) / max(expected, 1.0)
    if not difference <= _tolerance(trainer):  # a loss that is NaN is refused too
        raise SubstitutionError(
            f"trl {metadata.version('trl')}, transformers {metadata.version('transformers')}: the trainer computes a loss of "
            f"{actual:.4f} per labelled token where the model's logits give {expected:.4f}, so this run would train on a wrong "
            "loss. Set model.fused_loss=false. If that does not help, install the versions in constraints.txt (pip install -c "
            "constraints.txt -e .)."
        )


def _tolerance(trainer: CheckedTrainer) -> float:
    """Return the largest accepted difference for the run's precision and the number formats of its weights."""
    in_float32 = all(parameter.dtype == torch.float32 for parameter in trainer.trained_model.parameters())
    return FP32_TOLERANCE if in_float32 and trainer.precision == "fp32" else HALF_TOLERANCE


@contextlib.contextmanager
def _as_evaluated(trainer: CheckedTrainer) -> Iterator[None]:
    """Switch off dropout, gradients, compilation and token counts, and restore everything afterwards."""
    model, counts = trainer.trained_model, trainer.counts
    training_modes = [(module, module.training) for module in model.modules()]
    device = trainer.args.device
    devices = [device] if device.type == "cuda" else []
    trainer.counts = TokenCounts()
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), uncompiled(model):
            yield
    finally:
        trainer.counts = counts
        for module, training in training_modes:
            module.training = training
        if device.type == "cuda":
            torch.cuda.empty_cache()  # so that the run finds the allocator as it is planned: without these odd sizes


def _trainer_loss(trainer: CheckedTrainer, documents: list[TokenRow]) -> float:
    """Return the loss that a training step of these conversations alone would log."""
    rows = rows_of(trainer, documents)
    device = trainer.args.device
    batches, labelled_tokens = trainer.get_batch_samples(iter([trainer.held_out_collator(rows)]), 1, device)
    inputs = {name: on_device(value, device) for name, value in batches[0].items()}
    with autocast(device.type, trainer.precision):
        loss = trainer.compute_loss(trainer.trained_model, inputs, num_items_in_batch=labelled_tokens)
    return float(loss)


def _summed_cross_entropy(trainer: CheckedTrainer, document: TokenRow) -> float:
    """Return the summed cross-entropy in nats of a conversation's labelled tokens, from its logits (T, V)."""
    device = trainer.args.device
    with autocast(device.type, trainer.precision):
        logits = trainer.trained_model(
            input_ids=torch.tensor([document.input_ids], device=device), use_cache=False
        ).logits[0]
    targets = torch.tensor(document.labels[1:], device=device)
    losses = (
        F.cross_entropy(some_logits.float(), some_targets, ignore_index=IGNORED_LABEL, reduction="sum")
        for some_logits, some_targets in zip(logits[:-1].split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    )
    return sum(loss.item() for loss in losses)
