"""Training runs that other people measured, traced: stock transformers models, torch optimizers, full logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers

from lowvram_chat.tracing.materialise import materialise
from lowvram_chat.tracing.recorder import Event, TraceRecorder
from lowvram_chat.tracing.rules import DeviceRules

PLACES_OF_ZERO_GRAD = ("loop_top", "after_forward", "after_step")
"""Where in the loop the gradients are let go; `after_forward`: the last step's live through the forward pass."""


@dataclass(frozen=True, kw_only=True)
class StockRun:
    """One run, as a row of `vram_measured.csv` states it."""

    model_type: str
    """transformers' name of the model class: gpt2, gpt_neo, opt, ..."""
    config: Mapping[str, Any]
    """The model's configuration."""
    batch: int
    """Rows a step."""
    seq_len: int
    """Tokens a row."""
    optimizer: str
    """A class of `torch.optim`, with its default arguments but for the learning rate."""
    attention: str = "sdpa"
    mask: bool = True
    """Whether the batch carries an attention mask."""
    zero_grad: str = "after_step"
    """One of `PLACES_OF_ZERO_GRAD`."""
    steps: int = 2
    learning_rate: float = 1e-3


def build_stock_model(run: StockRun) -> torch.nn.Module:
    """The run's model on the meta device: shapes and no memory."""
    config = transformers.CONFIG_MAPPING[run.model_type](**run.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=run.attention)
    model.train()
    return cast(torch.nn.Module, model)


def trace_stock_run(run: StockRun, rules: DeviceRules) -> list[Event]:
    """Every birth and death of a storage in the whole run, from loading the model on."""
    model = build_stock_model(run)
    with TraceRecorder(rules) as recorder:
        materialise(model, recorder)
        run_stock_training(run, model, recorder)
    return recorder.events


def run_stock_training(run: StockRun, model: torch.nn.Module, recorder: TraceRecorder) -> None:
    """The training loop: names live exactly as long as they do in the scripts that were measured.

    `outputs` (logits, cached keys and values) is let go only when the next forward has returned.
    """
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), lr=run.learning_rate)
    for _ in range(run.steps):
        batch = _batch(run)
        recorder.label(batch.values(), "batch")
        _zero_grad_at("loop_top", run, optimizer)
        with recorder.phase("forward"):
            outputs = model(**batch)
        _zero_grad_at("after_forward", run, optimizer)
        with recorder.phase("backward"):
            outputs.loss.backward()
            recorder.label((parameter.grad for parameter in model.parameters()), "gradients")
        with recorder.phase("optimizer"):
            optimizer.step()
            recorder.label((value for state in optimizer.state.values() for value in state.values()), "optimizer state")
        _zero_grad_at("after_step", run, optimizer)


def _zero_grad_at(place: str, run: StockRun, optimizer: torch.optim.Optimizer) -> None:
    if run.zero_grad == place:
        optimizer.zero_grad(set_to_none=True)


def _batch(run: StockRun) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "labels") if run.mask else ("input_ids", "labels")
    return {name: torch.empty(run.batch, run.seq_len, dtype=torch.int64) for name in names}
