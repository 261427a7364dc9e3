"""No token may see a later one, nor packed documents each other: asked of the model itself, before a run relies on it.

transformers isolates documents by positions that restart, but only where an attention implementation builds its mask from
them; others let documents see each other without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lowvram_chat.errors import ModelError
from lowvram_chat.model.document_attention import document_mask, use_document_attention
from lowvram_chat.model.scoring import autocast

DOCUMENT_TOKENS = 8
"""Tokens of each of the two documents."""
MAX_LEAKAGE = 1e-5
"""Largest difference, relative to the largest state, when only what must not be seen changes: 0 to the bit where it is not
seen, whatever the type (ten architectures tried), and from 7e-4 on where it is (an untrained BERT of width 32)."""
MAX_KERNEL_DIFFERENCE = 1e-2
"""The same for a document alone and in a row, which other kernels may take: fp32 ones differ by 1e-6, fp16 ones by 1e-3."""


@torch.no_grad()
def sees_later_tokens(model: Any) -> bool:
    """Return whether a token's state depends on those after it."""
    row = torch.arange(1, DOCUMENT_TOKENS + 1, device=next(model.parameters()).device)[None]
    other = row.clone()
    other[:, -1] = 0
    with _in_eval(model) as base:
        first, second = (base.base_model(ids, use_cache=False).last_hidden_state[:, :-1] for ids in (row, other))
    return _difference(first.float(), second.float()) > MAX_LEAKAGE


@torch.no_grad()
def isolates_documents(model: Any) -> bool:
    """Return whether a packed document has the states that it has alone, whatever stands before it in its row."""
    device = next(model.parameters()).device
    second = torch.arange(1, DOCUMENT_TOKENS + 1, device=device)[None]
    positions = torch.arange(DOCUMENT_TOKENS, device=device)[None]

    def states(base: Any, before: int) -> torch.Tensor:
        row = torch.cat([torch.full_like(second, before), second], dim=1)
        places = torch.cat([positions, positions], dim=1)
        with document_mask(base, places) as documents:
            output = base.base_model(row, position_ids=places, use_cache=False, **documents)
        return output.last_hidden_state[:, DOCUMENT_TOKENS:].float()  # type: ignore[no-any-return]

    with _in_eval(model) as base:
        alone = base.base_model(second, use_cache=False).last_hidden_state.float()
        try:
            one, other = states(base, 1), states(base, 2)
        except TypeError:  # no such argument as position_ids
            return False
    return _difference(one, other) <= MAX_LEAKAGE and _difference(one, alone) <= MAX_KERNEL_DIFFERENCE


@contextlib.contextmanager
def _in_eval(model: Any) -> Iterator[Any]:
    """Yield the model under an adapter, without dropout while the block lasts."""
    was_training = model.training
    model.eval()
    try:
        yield _base(model)
    finally:
        model.train(was_training)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _difference(states: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest difference of two tensors of one shape, relative to the largest value of the second."""
    return float((states - others).abs().max() / others.abs().max())


def isolate_documents(model: Any, device: torch.device, precision: str, *, by_document: bool) -> None:
    """Ready a model for packed rows: `by_document` where it can attend so, else under its own mask.

    Raises:
        ModelError: as `check_isolation`.
    """
    base = _base(model)
    if by_document and use_document_attention(base):
        if isolates_documents(model):
            return
        base.set_attn_implementation("sdpa")  # its layers are not told of documents
    check_isolation(model, device, precision)


def check_causal(model: Any, device: torch.device, precision: str) -> None:
    """Refuse a model whose tokens see later ones (BERT as it comes): it would learn to copy what it should foretell.

    Raises:
        ModelError: so it is, or it cannot be asked.
    """
    if _probe(sees_later_tokens, model, device, precision):
        raise ModelError(
            f"model.name: the tokens of this {model.config.model_type} see those after them (tried on this model), so it is no "
            "causal language model. Use another model."
        )


def check_isolation(model: Any, device: torch.device, precision: str) -> None:
    """Refuse packed rows for a model that lets documents see each other, or that cannot be asked.

    Raises:
        ModelError: with what to set instead.
    """
    if not _probe(isolates_documents, model, device, precision):
        config = model.config
        raise ModelError(
            f"data.rows: packed, but {config.model_type} with {config._attn_implementation} attention lets packed conversations "
            "see each other (tried on this model). Set data.rows=grouped."
        )


def _probe(question: Callable[[Any], bool], model: Any, device: torch.device, precision: str) -> bool:
    """Return a model's answer, as it will be trained.

    Raises:
        ModelError: its attention does not run here.
    """
    attention = model.config._attn_implementation
    as_trained: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if attention == "flash_attention_2":  # runs on the card alone, and in half precision alone
        model.to(device)
        as_trained = autocast(device.type, precision)
    try:
        with as_trained:
            return question(model)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        other = "eager" if attention == "sdpa" else "sdpa"
        raise ModelError(
            f"model.attention: {attention} could not be tried ({reason}). Set model.attention={other}."
        ) from None
