"""A training step as people write it in plain PyTorch, listed operation by operation: what published speeds are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowvram_chat.model.scoring import autocast
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.materialise import materialise
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.recorder import TraceRecorder

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    """One optimizer step of a model whose forward returns the loss."""

    build: Callable[[], torch.nn.Module]
    """Makes the model, with the arguments `input_ids`, `labels` and those of `extra`."""
    rows: int
    length: int
    precision: str = "fp32"
    """fp32, or the autocast type: fp16 (with a gradient scaler) or bf16."""
    micro_batches: int = 1
    fused: bool = False
    """AdamW in one kernel, or by `torch._foreach` operations, CUDA's default."""
    clip: bool = False
    extra: tuple[str, ...] = ()


def trace_plain_step(step: PlainStep) -> list[list[Operation]]:
    """Returns the operations of the second optimizer step: a list for each of at most two micro-batches, and the update."""
    with torch.device("meta"):
        model = step.build()
    model.train()
    work: list[list[Operation]] = []
    with TraceRecorder(CudaRules(plain_rows=True)) as recorder:
        materialise(model, recorder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=step.fused or None)
        scaler = torch.amp.GradScaler("cpu", enabled=step.precision == "fp16")
        for number in range(2):
            batches = [_batch(step, recorder) for _ in range(min(2, step.micro_batches))]
            work = []
            for batch in batches:
                recorder.operations = _begun(work, number)
                _forward_and_backward(step, model, batch, scaler, recorder)
            recorder.operations = _begun(work, number)
            _update(step, model, optimizer, scaler, recorder)
            recorder.operations = None
    return work


def _begun(work: list[list[Operation]], number: int) -> list[Operation] | None:
    if number == 0:
        return None
    work.append([])
    return work[-1]


def _batch(step: PlainStep, recorder: TraceRecorder) -> Batch:
    names = ("input_ids", "labels", *step.extra)
    batch = {name: torch.zeros(step.rows, step.length, dtype=torch.int64) for name in names}
    recorder.label(batch.values(), "batch")
    return batch


def _forward_and_backward(
    step: PlainStep, model: torch.nn.Module, batch: Batch, scaler: torch.amp.GradScaler, recorder: TraceRecorder
) -> None:
    with recorder.phase("forward"), autocast("cpu", step.precision):
        result = model(**batch)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    with recorder.phase("backward"):
        scaler.scale(loss / step.micro_batches).backward()  # type: ignore[no-untyped-call]


def _update(
    step: PlainStep,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recorder: TraceRecorder,
) -> None:
    if step.clip:
        with recorder.phase("clipping"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with recorder.phase("optimizer"):
        scaler.step(optimizer)
        scaler.update()
        recorder.label((value for state in optimizer.state.values() for value in state.values()), "optimizer state")
    optimizer.zero_grad()
