"""One training step as people write it in plain PyTorch, traced operation by operation. Published speeds are of such steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutput

from lowvram_chat.model.scoring import autocast
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.materialise import materialise
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.recorder import TraceRecorder

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    """One optimizer step of a model whose forward pass returns the loss, or logits that are summed."""

    build: Callable[[], torch.nn.Module]
    """Makes the model. Its forward pass takes `input_ids`, `labels` (unless `sums_logits`) and the arguments in `extra`."""
    rows: int
    """Rows in a micro-batch."""
    length: int
    """Tokens per row."""
    precision: str = "fp32"
    """fp32, or the autocast type: fp16 (with a gradient scaler) or bf16."""
    weights: torch.dtype = torch.float32
    """The type of the parameters."""
    micro_batches: int = 1
    optimizer: bool = True
    """Whether AdamW updates the weights; else the step is a forward and a backward pass."""
    fused: bool = False
    """Whether AdamW runs in one kernel instead of `torch._foreach` operations, CUDA's default."""
    clip: bool = False
    """Whether gradients are clipped to a norm of 1."""
    sums_logits: bool = False
    """Whether the loss is `logits.sum()` instead of the model's own."""
    extra: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in an optimizer step."""
        return self.micro_batches * self.rows * self.length


def trace_plain_step(step: PlainStep) -> list[list[Operation]]:
    """Return the operations of the second optimizer step.

    There is one list for each of at most two micro-batches, and one for the update.
    """
    with torch.device("meta"):
        model = step.build().to(step.weights)
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
                recorder.operations = _new_list(work, number)
                _forward_and_backward(step, model, batch, scaler, recorder)
            recorder.operations = _new_list(work, number)
            _update(step, model, optimizer, scaler, recorder)
            recorder.operations = None
    return work


def _new_list(work: list[list[Operation]], number: int) -> list[Operation] | None:
    """Add a list of operations to `work` and return it; None in the first step, which is not listed."""
    if number == 0:
        return None
    work.append([])
    return work[-1]


def _batch(step: PlainStep, recorder: TraceRecorder) -> Batch:
    names = ("input_ids", *(() if step.sums_logits else ("labels",)), *step.extra)
    batch = {name: torch.zeros(step.rows, step.length, dtype=torch.int64) for name in names}
    recorder.label(batch.values(), "batch")
    return batch


def _forward_and_backward(
    step: PlainStep, model: torch.nn.Module, batch: Batch, scaler: torch.amp.GradScaler, recorder: TraceRecorder
) -> None:
    with recorder.phase("forward"), autocast("cpu", step.precision):
        loss = _loss(step, model(**batch))
    with recorder.phase("backward"):
        scaled: torch.Tensor = scaler.scale(loss / step.micro_batches)
        torch.autograd.backward(scaled)


def _loss(step: PlainStep, output: torch.Tensor | CausalLMOutput) -> torch.Tensor:
    """Return the loss () of a forward pass."""
    if isinstance(output, torch.Tensor):
        return output
    if step.sums_logits:
        assert output.logits is not None
        return output.logits.sum()
    assert output.loss is not None
    return output.loss


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
    if step.optimizer:
        with recorder.phase("optimizer"):
            scaler.step(optimizer)
            scaler.update()
            recorder.label((value for state in optimizer.state.values() for value in state.values()), "optimizer state")
    optimizer.zero_grad()
