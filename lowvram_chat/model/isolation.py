"""Checks on the model itself that no token sees a later one, and that packed documents do not see each other.

transformers isolates packed documents by positions that restart, but only if the attention implementation builds its mask
from them. Otherwise documents see each other, without a warning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from transformers import PreTrainedModel

from lowvram_chat.errors import ModelError, SubstitutionError
from lowvram_chat.model.adapters import ChatModel, base_model_of
from lowvram_chat.model.device import move_to_device
from lowvram_chat.model.document_attention import DOCUMENT_ATTENTION, attention_implementation
from lowvram_chat.model.document_mask import document_mask, use_attention_by_document
from lowvram_chat.model.scoring import autocast
from lowvram_chat.model.varlen_attention import VARLEN_ATTENTION

ON_ANY_DEVICE = ("sdpa", "eager", DOCUMENT_ATTENTION)
"""Attention implementations that run on a CPU and in fp32."""
DOCUMENT_TOKENS = 8
"""Number of tokens in each of the two test documents."""
MAX_LEAKAGE = 1e-5
"""Largest allowed change of the states, relative to the largest state, when only tokens that must not be seen change.
The change is exactly 0 in every dtype if they are not seen (ten architectures tried), and at least 7e-4 if they are (an
untrained BERT of width 32)."""
MAX_KERNEL_DIFFERENCE = 1e-2
"""The same limit between a document alone and the document in a row, which may run in different kernels: those differ by
1e-6 in fp32 and by 1e-3 in fp16."""


@torch.no_grad()
def sees_later_tokens(model: ChatModel) -> bool:
    """Return whether a token's state depends on later tokens."""
    row = torch.arange(1, DOCUMENT_TOKENS + 1, device=next(model.parameters()).device)[None]
    changed_row = row.clone()
    changed_row[:, -1] = 0
    with _base_in_eval_mode(model) as base:
        states, changed_states = (
            base.base_model(ids, use_cache=False).last_hidden_state[:, :-1].float() for ids in (row, changed_row)
        )
    return _relative_difference(states, changed_states) > MAX_LEAKAGE


@torch.no_grad()
def isolates_documents(model: ChatModel) -> bool:
    """Return whether a packed document has the same states as alone, whatever precedes it in its row."""
    document = torch.arange(1, DOCUMENT_TOKENS + 1, device=next(model.parameters()).device)[None]
    with _base_in_eval_mode(model) as base:
        alone = base.base_model(document, use_cache=False).last_hidden_state.float()
        try:
            after_ones, after_twos = (_states_after(base, document, neighbour) for neighbour in (1, 2))
        except TypeError:  # the model takes no position_ids
            return False
    leakage, kernel_difference = _relative_difference(after_ones, after_twos), _relative_difference(after_ones, alone)
    return leakage <= MAX_LEAKAGE and kernel_difference <= MAX_KERNEL_DIFFERENCE


def _states_after(base: PreTrainedModel, document: torch.Tensor, neighbour: int) -> torch.Tensor:
    """Return the fp32 states (1, T, d) of a document (1, T) packed after a document of `neighbour` tokens."""
    row = torch.cat([torch.full_like(document, neighbour), document], dim=1)
    positions = torch.arange(DOCUMENT_TOKENS, device=document.device).repeat(2)[None]
    ends = DOCUMENT_TOKENS * torch.arange(3, dtype=torch.int32, device=document.device)
    with document_mask(base, positions, ((2 * DOCUMENT_TOKENS, ends),)) as documents:
        output = base.base_model(row, position_ids=positions, use_cache=False, **documents)
    states: torch.Tensor = output.last_hidden_state[:, DOCUMENT_TOKENS:]
    return states.float()


@contextlib.contextmanager
def _base_in_eval_mode(model: ChatModel) -> Iterator[PreTrainedModel]:
    """Yield the base model; dropout is off while the context is open."""
    was_training = model.training
    model.eval()
    try:
        yield base_model_of(model)
    finally:
        model.train(was_training)


def _relative_difference(states: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference of two tensors of one shape, relative to the largest value of the reference."""
    return float((states - reference).abs().max() / reference.abs().max())


def isolate_documents(
    model: ChatModel, device: torch.device, precision: str, by_document: Literal["cpu", "cuda"] | None
) -> None:
    """Prepare a model for packed rows: with attention by document on this kind of device, if possible, else with its own mask.

    Raises:
        ModelError: as `check_isolation`.
        SubstitutionError: CUDA's attention by document does not run, or lets documents see each other.
    """
    base = base_model_of(model)
    if by_document == "cpu" and use_attention_by_document(base, DOCUMENT_ATTENTION):
        if isolates_documents(model):
            return
        base.set_attn_implementation("sdpa")  # its layers are not given `documents`
    if by_document == "cuda" and use_attention_by_document(base, VARLEN_ATTENTION):
        _check_varlen(model, device, precision)
    else:
        check_isolation(model, device, precision)


def _check_varlen(model: ChatModel, device: torch.device, precision: str) -> None:
    """Check CUDA's attention by document on the model, under the conditions of training.

    Raises:
        SubstitutionError: it does not run, or lets documents see each other.
    """
    reason = "packed conversations have other states than alone"
    try:
        if _run_check(isolates_documents, model, device, precision):
            return
    except ModelError as error:
        reason = str(error)
    raise SubstitutionError(
        f"model.document_attention: torch's attention over documents of varying length is not right here ({reason}). Set "
        "model.document_attention=false.",
        settings=("model.document_attention",),
    )


def check_causal(model: ChatModel, device: torch.device, precision: str) -> None:
    """Refuse a model whose tokens see later ones (such as BERT): it would learn to copy the token that it should predict.

    Raises:
        ModelError: tokens see later ones, or the check cannot run.
    """
    if _run_check(sees_later_tokens, model, device, precision):
        raise ModelError(
            f"model.name: the tokens of this {model.config.model_type} see later tokens (tested on this model), so it is not "
            "a causal language model. Use another model."
        )


def check_isolation(model: ChatModel, device: torch.device, precision: str) -> None:
    """Refuse packed rows for a model that lets documents see each other.

    Raises:
        ModelError: documents see each other, or the check cannot run; with the setting to change.
    """
    if not _run_check(isolates_documents, model, device, precision):
        config = model.config
        raise ModelError(
            f"data.rows: packed, but {config.model_type} with {attention_implementation(config)} attention lets packed "
            "conversations see each other (tested on this model). Set data.rows=grouped."
        )


def _run_check(check: Callable[[ChatModel], bool], model: ChatModel, device: torch.device, precision: str) -> bool:
    """Return the check's result on the model, under the conditions of training.

    Raises:
        ModelError: the attention implementation does not run on this machine.
    """
    attention = attention_implementation(model.config)
    conditions: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if attention not in ON_ANY_DEVICE:  # runs only on a GPU and only in half precision
        move_to_device(model, device)
        conditions = autocast(device.type, precision)
    try:
        with conditions:
            return check(model)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        alternative = "eager" if attention == "sdpa" else "sdpa"
        raise ModelError(
            f"model.attention: {attention} does not run on this machine ({reason}). Set model.attention={alternative}."
        ) from None
