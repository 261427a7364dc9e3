"""The training loss: cross-entropy over the labelled positions only, in tiles, without ever holding all logits.

(B, T, V) logits of GPT-2 at 4 x 1,024 are 392 MiB in fp16 and 785 MiB in fp32: the largest tensors of a stock step. Here
the hidden states of the labelled positions (N, d) meet the head (V, d) in tiles of some rows; each tile's gradient is
taken at once, while its logits are there, so that nothing of size (N, V) is kept for the backward pass and no product is
computed twice. Source of the idea: Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).

The same function runs in training, in evaluation and in the planner's trace: what is planned is what runs.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from lowvram_chat.model.document_attention import document_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY_MULTIPLE = 64
"""Half-precision products are fast where a matrix's rows begin at multiples of 16 bytes: 50,257 columns do not, 50,304 do.
Source: NVIDIA's deep-learning performance guide, "Requirements to use tensor cores"."""


class Tiling(NamedTuple):
    """How the products with the head are cut, and how its vocabulary is rounded up in them."""

    rows: int
    """Of logits held at once: 512 x 50,257 are 98 MiB in fp32 and 49 in fp16, both there for a moment."""
    multiple: int = VOCABULARY_MULTIPLE
    always: bool = False
    """In fp32 too, which pays on a CPU; else in half precision only, where it costs a copy of the head at most."""


CUDA_TILING = Tiling(512)
CPU_TILING = Tiling(2048, always=True)
"""Tiles of 512 rows, as a card has them for its memory's sake, made loss and gradient 4 to 9 % slower there."""

HEAD_GRADIENT_SCALE = 0.125
"""The head's gradient is summed over a tile at this scale, against overflow in fp16."""


class _TiledCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of (N, d) hidden states under a (V, d) head with (V,) bias or none."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd hands them over by place)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tiling: Tiling,
        compiled: bool,
    ) -> torch.Tensor:
        """Return the summed loss (), fp32, and keep the gradients for the backward pass.

        `compiled` has a tile's passes over its logits fused, but in fp32 on a CPU, where `_by_softmax` is faster.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        of_a_tile = _of_a_tile(device, dtype, compiled=compiled)
        needs_hidden, needs_weight, needs_bias = (needed for needed in ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        size, padded = weight.size(0), _rounded(weight, dtype, tiling)
        # Before the head's copy, whose room is needed no longer than the loop.
        d_weight = weight.new_zeros(padded if dtype == weight.dtype else size, weight.size(1)) if needs_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        head = _head(weight, dtype, padded)
        held = _held_logits(min(tiling.rows, hidden.size(0)), head)
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.size(0), tiling.rows):
                rows = slice(start, start + tiling.rows)
                states = hidden[rows].to(dtype)
                logits = _logits(states, head, held)
                logits[:, size:] = -torch.inf
                if bias is not None:
                    logits[:, :size] += bias
                loss, gradient = of_a_tile(logits, targets[rows, None])
                total += loss
                if d_hidden is not None:
                    d_hidden[rows] = gradient @ head
                if d_weight is not None:
                    _add_product(d_weight, gradient.t(), states * HEAD_GRADIENT_SCALE)
                if d_bias is not None:
                    d_bias += gradient.sum(0)[:size]
                del logits, gradient
        if d_weight is not None and d_weight.size(0) != size:
            d_weight.resize_(weight.shape)  # not a view, which the engine would copy
        ctx.gradients = [d_hidden, d_weight, d_bias]
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        """Return the kept gradients times the upstream one (); they are given away, so this runs once."""
        gradients, ctx.gradients = ctx.gradients, None
        scales = (upstream[0], upstream[0] / HEAD_GRADIENT_SCALE, upstream[0])
        scaled = (None if g is None else g.mul_(scale) for g, scale in zip(gradients, scales, strict=True))
        return (*scaled, None, None, None)


def _rounded(weight: torch.Tensor, dtype: torch.dtype, tiling: Tiling) -> int:
    """Return the rows V' of the head in the products."""
    size = weight.size(0)
    wanted = tiling.always or dtype != torch.float32
    return -(-size // tiling.multiple) * tiling.multiple if wanted else size


def _head(weight: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Return the head (V, d) in the type of the products; a copy of more rows (V', d) has zeros below."""
    if dtype == weight.dtype and rows == weight.size(0):
        return weight
    head = weight.new_empty((rows, weight.size(1)), dtype=dtype)
    head[: weight.size(0)] = weight
    head[weight.size(0) :] = 0
    return head


def _held_logits(rows: int, head: torch.Tensor) -> torch.Tensor | None:
    """Return memory for a tile's fp32 logits, where they are what a product gives: a CPU pays for every fresh page."""
    return head.new_empty(rows, head.size(0)) if head.dtype == torch.float32 else None


def _logits(states: torch.Tensor, head: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """Return a tile's logits (rows, V) in the type of the products, those in fp32 in the memory held for them."""
    if held is None:
        return F.linear(states, head)
    return torch.mm(states, head.t(), out=held[: states.size(0)])


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add a product to a sum; half-precision products are rounded first, and their rows of padding left out."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += (one @ other)[: total.size(0)]


def _of_a_tile(device: str, dtype: torch.dtype, *, compiled: bool) -> Any:
    """Return what makes a tile's loss and gradient out of its logits in this type and its targets (rows, 1)."""
    if device == "cpu" and dtype == torch.float32:
        return _by_softmax
    return _compiled_tile() if compiled else _loss_and_gradient


def _by_softmax(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_loss_and_gradient` does, for fp32 logits on a CPU: its exp of a whole tile takes longer than a softmax.

    The logarithm of a row's sum is found at its largest entry, whose probability never underflows.
    """
    largest = logits.amax(1, keepdim=True)
    of_targets = logits.gather(1, targets) - largest
    gradient = torch.softmax(logits, 1, out=logits)
    of_targets += gradient.amax(1, keepdim=True).log()
    return -of_targets.sum(), gradient.scatter_(1, targets, of_targets.expm1())


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tile's summed loss (), fp32, and softmax - one-hot (rows, V), in the logits' memory and type.

    `targets` is (rows, 1). Two passes over the tile, with the logarithms of the probabilities in fp32 between them: a card
    waits here for its memory, not for its arithmetic.
    """
    log_probabilities = _log_softmax(logits)
    of_targets = log_probabilities.gather(1, targets)
    gradient = torch.exp(log_probabilities, out=logits)
    # In fp32 until here: p - 1 of a probability that was rounded first would be off by what p is close to 1.
    return -of_targets.sum(), gradient.scatter_(1, targets, of_targets.expm1().to(gradient.dtype))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities (rows, V), fp32; logits that are fp32 already give their memory."""
    if logits.dtype == torch.float16:  # CUDA's kernel casts as it reads; bf16 it would copy first
        return F.log_softmax(logits, 1, dtype=torch.float32)
    logits = logits.float()
    return torch.log_softmax(logits, 1, out=logits)


@functools.cache
def _compiled_tile() -> Any:
    """Return `_loss_and_gradient`, compiled once for tiles of any number of rows."""
    return torch.compile(_loss_and_gradient, dynamic=True)


def summed_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    labels: torch.Tensor,
    loss_positions: torch.Tensor,
    tiling: Tiling = CUDA_TILING,
    *,
    compiled: bool = False,
) -> torch.Tensor:
    """Return the summed cross-entropy () in nats of the labelled tokens, fp32.

    `hidden` (B, T, d) are the backbone's last states; `labels` (B, T) hold -100 where there is no loss; `loss_positions`
    (N,) are the places in (B * T,) whose next token is labelled (see `data.rows.Collator`).
    """
    states = hidden.flatten(0, 1).index_select(0, loss_positions)
    targets = labels.flatten().index_select(0, loss_positions + 1)
    loss: torch.Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, head.weight, getattr(head, "bias", None), targets, tiling, compiled
    )
    return loss


def attach_loss(
    model: PreTrainedModel, *, fused: bool = True, pad_vocabulary: bool = True, on_cpu: bool = False
) -> None:
    """Let `model(input_ids, labels=, loss_positions=)` return the summed loss; other calls are as before.

    `fused=False` takes the model's own loss from all logits instead; `on_cpu` cuts the products as they are fastest there.
    Rows with `position_ids` are packed.
    The forward is replaced on the object, not called around it, so that wrappers (PEFT, DistributedDataParallel) see it.
    """
    original = model.forward
    tiling = CPU_TILING if on_cpu else CUDA_TILING
    if not pad_vocabulary:
        tiling = tiling._replace(multiple=1)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, loss_positions: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if loss_positions is None:
            return original(*args, **kwargs)
        with document_mask(self, kwargs.get("position_ids")) as documents:
            kwargs |= documents
            if not fused:
                return {"loss": original(*args, use_cache=False, num_items_in_batch=1, **kwargs).loss}
            labels = kwargs.pop("labels")
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        compiled = self.base_model._compiled_call_impl is not None
        head = self.get_output_embeddings()
        return {"loss": summed_loss(hidden, head, labels, loss_positions, tiling, compiled=compiled)}

    model.forward = MethodType(forward, model)
