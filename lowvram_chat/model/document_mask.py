"""How the documents of packed rows are kept apart: by attention that runs within each document, or by a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lowvram_chat.model.document_attention import DOCUMENT_ATTENTION, attention_implementation
from lowvram_chat.model.flash_attention import is_plain_causal
from lowvram_chat.model.substitutions import packing_declared
from lowvram_chat.model.varlen_attention import VARLEN_ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowvram_chat.data.rows import DocumentGroups


def use_attention_by_document(base: PreTrainedModel, name: str) -> bool:
    """Switch a model with plain causal `sdpa` attention to an implementation, and return whether it now uses it.

    `name` is `DOCUMENT_ATTENTION`, for a CPU, or `VARLEN_ATTENTION`, for a graphics card.
    """
    if attention_implementation(base.config) != "sdpa" or not is_plain_causal(base.config):
        return False
    base.set_attn_implementation(name)
    return attention_implementation(base.config) == name


@contextlib.contextmanager
def document_mask(
    base: PreTrainedModel, position_ids: torch.Tensor | None, document_groups: DocumentGroups | None = None
) -> Iterator[dict[str, Any]]:
    """Keep the documents of packed rows apart while the context is open, and yield further arguments for the model's call.

    `position_ids` (B, T) restart at 0 with each document; None means that each row is one document. `document_groups` are as in
    `data.rows.Collator`; without them, a model with `VARLEN_ATTENTION` uses a mask.
    """
    attention = attention_implementation(base.config)
    arguments: dict[str, Any] = {}
    if attention == DOCUMENT_ATTENTION and position_ids is not None:
        arguments = {"documents": _document_lengths(position_ids)}
    elif attention == VARLEN_ATTENTION and document_groups is not None:
        arguments = {"document_groups": document_groups}
    with packing_declared(packed=position_ids is not None and not arguments):
        yield arguments


def _document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Return the number of tokens in each document. Meant for CPU tensors: on a GPU it would synchronize."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([position_ids.numel()])).tolist()
