"""Packed documents must not see each other: asked of the model itself, before a run relies on it.

transformers isolates documents by positions that restart, but only where an attention implementation builds its mask from
them; others let documents see each other without a word.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lowvram_chat.errors import ModelError
from lowvram_chat.model.documents import attend_by_document, kept_apart
from lowvram_chat.model.scoring import autocast

LENGTH = 8
"""Tokens of each of the two documents."""
TOLERANCE = 1e-2
"""Largest difference, relative to the largest state: fp32 kernels differ by 1e-6 and fp16 ones by 1e-3, a document that is
seen by 0.1 and more."""


@torch.no_grad()
def isolates_documents(model: Any) -> bool:
    """Return whether a packed document has the states that it has alone, whatever stands before it in its row."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    second = torch.arange(1, LENGTH + 1, device=device)[None]
    positions = torch.arange(LENGTH, device=device)[None]

    def states(before: int) -> torch.Tensor:
        row = torch.cat([torch.full_like(second, before), second], dim=1)
        places = torch.cat([positions, positions], dim=1)
        with kept_apart(base, places) as documents:
            output = base.base_model(row, position_ids=places, use_cache=False, **documents)
        return output.last_hidden_state[:, LENGTH:].float()  # type: ignore[no-any-return]

    alone = base.base_model(second, use_cache=False).last_hidden_state.float()
    try:
        largest = max(float((states(before) - alone).abs().max()) for before in (1, 2))
    except TypeError:  # no such argument as position_ids
        largest = float("inf")
    model.train(was_training)
    return largest <= TOLERANCE * float(alone.abs().max())


def keep_documents_apart(model: Any, device: torch.device, precision: str, *, by_document: bool) -> None:
    """Ready a model for packed rows: `by_document` where it can attend so, else under its own mask.

    Raises:
        ModelError: as `check_isolation`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if by_document and attend_by_document(base):
        if isolates_documents(model):
            return
        base.set_attn_implementation("sdpa")  # its layers are not told of documents
    check_isolation(model, device, precision)


def check_isolation(model: Any, device: torch.device, precision: str) -> None:
    """Refuse packed rows for a model that lets documents see each other, or that cannot be asked.

    Raises:
        ModelError: with what to set instead.
    """
    config = model.config
    as_trained: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if config._attn_implementation == "flash_attention_2":  # runs on the card alone, and in half precision alone
        model.to(device)
        as_trained = autocast(device.type, precision)
    try:
        with as_trained:
            isolated = isolates_documents(model)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"data.rows: packed, but whether {config._attn_implementation} attention keeps packed conversations apart could not "
            f"be tried ({reason}). Set model.attention=sdpa, or data.rows=grouped."
        ) from None
    if not isolated:
        raise ModelError(
            f"data.rows: packed, but {config.model_type} with {config._attn_implementation} attention lets packed conversations "
            "see each other (tried on this model). Set data.rows=grouped."
        )
