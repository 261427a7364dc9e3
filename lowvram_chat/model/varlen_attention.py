"""Attention within each document of a packed row on a graphics card, in one kernel for all documents and without a mask.

transformers keeps packed documents apart with a mask (B, 1, T, T). Under a mask CUDA selects the memory-efficient kernel, which
multiplies every pair of tokens in a row. `torch.nn.attention.varlen.varlen_attn` is FlashAttention-2 over documents of varying
length: it multiplies only the pairs within each document, and needs no mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowvram_chat.errors import ModelError

if TYPE_CHECKING:
    from lowvram_chat.data.rows import DocumentGroups

VARLEN_ATTENTION = "varlen_by_document"
"""Name of the attention implementation in transformers' tables; for a batch without documents it equals `sdpa`."""


def varlen_attention(  # noqa: PLR0917  (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_groups: DocumentGroups | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (B, T, H, D) of (B, H, T, D) heads, causal within each document.

    `document_groups` are those of `data.rows.Collator`. No document exceeds T, which is given as the longest length, so that the
    host need not wait for the device.

    Raises:
        ModelError: the layer has dropout, which the kernel lacks.
    """
    if document_groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ModelError("model.document_attention: the attention of this model has dropout. Set model.dropout=0.0.")
    rows, length = query.shape[0], query.shape[2]
    grouped, scale = query.shape[1] != key.shape[1], kwargs.get("scaling")

    def attend(ends: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        causal = (-1, 0)
        output = varlen_attn(q, k, v, ends, ends, length, length, scale=scale, window_size=causal, enable_gqa=grouped)
        assert isinstance(output, torch.Tensor)
        return output

    q, k, v = (_tokens(heads) for heads in (query, key, value))
    sizes = [tokens for tokens, _ in document_groups]
    parts = zip(document_groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outputs = [attend(ends, *heads) for (_, ends), *heads in parts]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.unflatten(0, (rows, length)), None


def _tokens(heads: torch.Tensor) -> torch.Tensor:
    """Return heads (B, H, T, D) as tokens (B * T, H, D), in the type of autocast, which does not know the kernel."""
    device = heads.device.type
    if torch.is_autocast_enabled(device):
        heads = heads.to(torch.get_autocast_dtype(device))
    return heads.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, sdpa_mask)
