"""Scores a run or model on held-out conversations: loss on the assistant's tokens and on all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_chat.data.dataset import held_out_source, load_held_out, load_rows
from lowvram_chat.data.row_reader import format_of_part
from lowvram_chat.data.rows import Collator
from lowvram_chat.data.sources import BadRow
from lowvram_chat.data.template import set_template
from lowvram_chat.model.adapters import base_model_of
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.out_of_memory import advised
from lowvram_chat.model.pretrained import check_positions
from lowvram_chat.model.saved import DEVICE_ADVICE, open_model
from lowvram_chat.model.scoring import Score, score
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def evaluate_model(
    model: str, data: Data, *, batch_size: int, fit_length: bool, device: str = "auto"
) -> dict[str, Score]:
    """Return the scores under "assistant" and "all"; data without roles has "all" only.

    `fit_length`: shorten the rows to the model's positions instead of refusing rows that are longer.

    Raises:
        LowVramError: the model or the data cannot be loaded, or a row does not fit the device.
    """
    opened = open_model(model, device)
    if fit_length:
        data = data.model_copy(update={"max_length": min(data.max_length, opened.positions)})
    check_positions(opened.model.config, data.max_length, model)
    tokenizer = opened.tokenizer
    attach_loss(base_model_of(opened.model), fused=opened.recipe.model.fused_loss if opened.recipe else True)
    set_template(tokenizer, "own" if tokenizer.chat_template else "plain", "all")
    collate = Collator(int(tokenizer.pad_token_id))
    seed = opened.recipe.train.seed if opened.recipe else 0
    scores = {}
    for loss_on in ["assistant", "all"] if _has_roles(data) else ["all"]:
        rows = held_out_rows(data.model_copy(update={"loss_on": loss_on}), tokenizer, seed)
        with advised(model, DEVICE_ADVICE[opened.model.device.type]):
            scores[loss_on] = score(opened.model, rows, collate, batch_size)
    return scores


def held_out_rows(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> datasets.Dataset:
    """Return the rows to score: those held out by the section's source, split or fraction."""
    rows = (
        load_rows(data, tokenizer, seed).held_out if data.eval_fraction is not None else load_held_out(data, tokenizer)
    )
    assert rows is not None, "the section names no held-out rows"
    return rows


def _has_roles(data: Data) -> bool:
    """Return whether the held-out conversations, of all files, tell the assistant's words from the rest."""
    for part in held_out_source(data).parts:
        first = next(((where, row) for where, row in part.rows() if not isinstance(row, BadRow)), None)
        if first is not None and not FORMATS[format_of_part(part, first[1], first[0], data.format)].has_roles:
            return False
    return True
