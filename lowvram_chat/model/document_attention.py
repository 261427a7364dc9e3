"""Attention within each document of a packed row, one document at a time: on a CPU it costs only the documents' own pairs.

transformers keeps packed documents apart with a mask (B, 1, T, T), and under a mask the CPU kernel still multiplies every
pair of tokens in a row. With one call per document no mask is needed, and the causal kernel also skips half of each
document's pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowvram_chat.private_names import check_private_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

check_private_names("transformers.PreTrainedConfig._attn_implementation")

DOCUMENT_ATTENTION = "sdpa_by_document"
"""Name of the attention implementation in transformers' tables; for a batch without documents it equals `sdpa`."""


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention implementation that a model with this config uses."""
    name: str | None = config._attn_implementation
    return name


def document_attention(  # noqa: PLR0917  (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (B, T, H, D) of (B, H, T, D) heads, causal within each document.

    `documents` holds the length of each document, row after row, B * T tokens in all.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    one_row = [heads.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for heads in (query, key, value)]
    per_document = zip(*(heads.split(documents, dim=2) for heads in one_row), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in per_document]
    return torch.cat(outputs, dim=1).view(query.size(0), query.size(2), query.size(1), -1), None


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
