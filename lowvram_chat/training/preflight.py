"""Runs the longest batch first: what does not fit should fail now, not at hour five."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowvram_chat.data.rows import MODEL_INPUTS, Collator
from lowvram_chat.model.scoring import autocast, row_lengths

if TYPE_CHECKING:
    import datasets
    from torch import nn


def run_longest_batch(
    model: nn.Module, rows: datasets.Dataset, collate: Collator, batch_size: int, precision: str
) -> int:
    """Run forward and backward on the batch of the longest rows, free its gradients, and return its row length.

    Weights, gradients and random states are as before.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    lengths = row_lengths(rows)
    longest = sorted(range(len(rows)), key=lambda number: -lengths[number])[:batch_size]
    batch = collate([rows[number] for number in longest])
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
        with autocast(device.type, precision):
            loss = model(**inputs)["loss"]
        (loss / inputs["loss_positions"].numel()).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return int(inputs["input_ids"].size(1))
