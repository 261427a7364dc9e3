"""Checks that a model was loaded whole: transformers fills in random weights for missing ones, and ignores unknown ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from lowvram_chat.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BUFFERS = re.compile(r"(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
"""Tensors of older files that hold constants, which models now compute."""
MAX_LISTED = 5
"""Names that a message lists."""

LoadingReport = Mapping[str, Collection[str] | Collection[tuple[str, object, object]]]
"""What `from_pretrained(..., output_loading_info=True)` returns beside the model."""


def check_loading_report(report: LoadingReport, name: str) -> None:
    """Refuse a model some of whose weights were missing, unknown or of another shape.

    Raises:
        ModelError: with the names of the weights.
    """
    missing = sorted(str(key) for key in report["missing_keys"])
    unexpected = sorted(str(key) for key in report["unexpected_keys"] if not BUFFERS.search(str(key)))
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    problems = [
        *([f"{_listed(missing)} missing, so random values would take their place"] if missing else []),
        *([f"{_listed(mismatched)} of another shape"] if mismatched else []),
        *([f"{_listed(unexpected)} unknown to this kind of model"] if unexpected else []),
    ]
    if problems:
        raise ModelError(
            f"{name}: the weights do not match config.json: {'; '.join(problems)}. Download the model again, or save it again."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more} {'is' if len(names) == 1 else 'are'}"


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with a weight that is infinite or not a number.

    Raises:
        ModelError: with the name of the weight.
    """
    for weight, parameter in (*model.named_parameters(), *persistent_buffers(model)):
        # A sum is finite only if every term is; a finite tensor whose sum overflows is looked at in full.
        is_finite = not parameter.is_floating_point() or parameter.is_meta or bool(parameter.sum().isfinite())
        if not is_finite and not bool(parameter.isfinite().all()):
            raise ModelError(f"{name}: the weight {weight} holds values that are not finite. Download the model again.")


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the name and the tensor of each buffer that is saved with the weights."""
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def check_tied_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose file holds another head than the embeddings, though its configuration ties them.

    transformers 5 keeps the two apart; transformers 4 and other programs drop the head of the file.

    Raises:
        ModelError: the head is not the embeddings.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not is_tied or head is None or head.weight is embeddings.weight or head.weight.shape != embeddings.weight.shape:
        return
    if not _is_equal(head.weight, embeddings.weight):
        raise ModelError(
            f"{name}: config.json ties the head to the embeddings, but the weights have a head of their own. Set "
            "tie_word_embeddings to false in config.json."
        )


def _is_equal(one: object, other: object) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
