"""Packed rows' attention, one document after the other: what it costs on a CPU is then that of the documents alone.

transformers keeps packed documents apart with a mask (B, 1, T, T), under which a CPU's kernel still multiplies every pair of
a row's tokens. Where each document is a call of its own there is no mask, and half of a document's pairs are left out too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowvram_chat.model.substitutions import packing_declared

DOCUMENT_ATTENTION = "sdpa_by_document"
"""The attention implementation's name in transformers' tables; where a batch has no documents it is `sdpa`."""
UNSUPPORTED_MASK_SETTINGS = ("sliding_window", "attention_chunk_size")
"""Config fields of models that hide more than the tokens to come."""


def document_attention(  # noqa: PLR0917  (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention (B, T, H, D) of (B, H, T, D) heads, causal within each of the documents.

    `documents` are their lengths, row after row, B * T tokens in all.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    in_a_line = [heads.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for heads in (query, key, value)]
    pieces = zip(*(heads.split(documents, dim=2) for heads in in_a_line), strict=True)
    outputs = [sdpa_attention_forward(module, *piece, None, **kwargs)[0] for piece in pieces]
    return torch.cat(outputs, dim=1).view(query.size(0), query.size(2), query.size(1), -1), None


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)


def use_document_attention(base: Any) -> bool:
    """Let a model with plain causal `sdpa` attention take packed documents one by one; return whether it now does."""
    config = base.config
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if (
        config._attn_implementation != "sdpa"
        or others
        or any(getattr(config, name, None) for name in UNSUPPORTED_MASK_SETTINGS)
    ):
        return False
    base.set_attn_implementation(DOCUMENT_ATTENTION)
    return bool(config._attn_implementation == DOCUMENT_ATTENTION)


@contextlib.contextmanager
def document_mask(base: Any, position_ids: torch.Tensor | None) -> Iterator[dict[str, list[int]]]:
    """Keep the documents of packed rows apart, whose positions (B, T) restart; None: rows of one document each.

    Yields what the model's call is given on top.
    """
    packed = position_ids is not None
    by_document = packed and base.config._attn_implementation == DOCUMENT_ATTENTION
    with packing_declared(packed=packed and not by_document):
        yield {"documents": _lengths(position_ids)} if by_document and position_ids is not None else {}


def _lengths(position_ids: torch.Tensor) -> list[int]:
    """Return the tokens of each document (of a CPU's rows: a card would be waited for)."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([position_ids.numel()])).tolist()  # type: ignore[no-any-return]
