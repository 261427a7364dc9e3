"""The training loss: the summed cross-entropy of the labelled tokens, without ever holding all logits.

The (B, T, V) logits of GPT-2 at 4 x 1,024 take 392 MiB in fp16 and 785 MiB in fp32; they are the largest tensors of a stock
training step. Training, evaluation and the planner's trace all call this loss, so the plan covers exactly what runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from lowvram_chat.model.compilation import is_compiled
from lowvram_chat.model.document_mask import document_mask
from lowvram_chat.model.logits import LogitTransform, logit_transform
from lowvram_chat.model.tiled_cross_entropy import CPU_TILING, CUDA_TILING, Tiling, tiled_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def summed_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    labels: torch.Tensor,
    loss_positions: torch.Tensor,
    tiling: Tiling = CUDA_TILING,
    *,
    transform: LogitTransform = LogitTransform(),  # noqa: B008  (it is frozen)
    compiled: bool = False,
) -> torch.Tensor:
    """Return the summed cross-entropy () of the labelled tokens, in nats and fp32.

    `hidden` (B, T, d) are the backbone's last hidden states. `labels` (B, T) are -100 where there is no loss.
    `loss_positions` (N,) are the indices into (B * T,) whose next token is labelled (see `data.rows.Collator`).
    `transform` is what the model does to its logits after the head.
    """
    states = hidden.flatten(0, 1).index_select(0, loss_positions)
    if transform.scale != 1:
        states = states * transform.scale  # as good as the logits' own scale, and much smaller
    targets = labels.flatten().index_select(0, loss_positions + 1)
    weight = cast("torch.Tensor", head.weight)
    bias = getattr(head, "bias", None)
    if not torch.is_grad_enabled():  # an autograd function is asked for gradients under `no_grad` too
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if bias is not None and transform.scale != 1:
        bias = bias * transform.scale
    return tiled_cross_entropy(states, weight, bias, targets, tiling, transform.cap, compiled)


class LossForward:
    """The `forward` of a model with its loss attached. It takes the place of the method on one object, and can be pickled."""

    def __init__(self, model: PreTrainedModel, transform: LogitTransform | None, tiling: Tiling) -> None:
        """Keep the model's present `forward`; `transform` None means the model's own loss from all logits."""
        self.model, self.transform, self.tiling = model, transform, tiling
        self.original: Callable[..., Any] = model.forward
        functools.update_wrapper(self, type(model).forward)

    def __call__(self, *args: object, loss_positions: torch.Tensor | None = None, **kwargs: Any) -> object:
        """Return {"loss": summed loss ()}; without `loss_positions`, what the model's own forward returns."""
        if loss_positions is None:
            return self.original(*args, **kwargs)
        model = self.model
        with document_mask(model, kwargs.get("position_ids"), kwargs.pop("document_groups", None)) as documents:
            kwargs |= documents
            if self.transform is None:
                return {"loss": self.original(*args, use_cache=False, num_items_in_batch=1, **kwargs).loss}
            labels = kwargs.pop("labels")
            hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head, compiled = model.get_output_embeddings(), is_compiled(model.base_model)
        loss = summed_loss(
            hidden, head, labels, loss_positions, self.tiling, transform=self.transform, compiled=compiled
        )
        return {"loss": loss}


def attach_loss(
    model: PreTrainedModel, *, fused: bool = True, pad_vocabulary: bool = True, on_cpu: bool = False
) -> None:
    """Make `model(input_ids, labels=, loss_positions=)` return the summed loss. Calls without `loss_positions` do not change.

    `fused=False` computes the model's own loss from all logits instead, as does a model whose logits the fused loss cannot
    compute; the log says so. `on_cpu` chooses the tiling that is fastest on a CPU. Rows with `position_ids` are packed.
    The object's forward is replaced, not wrapped, so that wrappers (PEFT, DistributedDataParallel) use the new one.
    """
    transform = logit_transform(model.config) if fused else None
    if fused and transform is None:
        log.warning(
            "model.fused_loss: %s computes its logits in a way of its own, so the model's own loss is used, which needs more "
            "memory",
            model.config.model_type,
        )
    tiling = CPU_TILING if on_cpu else CUDA_TILING
    if not pad_vocabulary:
        tiling = tiling._replace(multiple=1)
    model.forward = LossForward(model, transform, tiling)
