"""Loads the training rows and the held-out rows of a recipe's data section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_chat.data.packing import pack_rows
from lowvram_chat.data.reader import Facts
from lowvram_chat.data.rows import split_by_conversation
from lowvram_chat.data.sources import Source, open_source
from lowvram_chat.data.tokenize import tokenize
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a recipe, and counts of what its training source held."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    """None where the recipe holds nothing out."""
    facts: Facts


def load_rows(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedRows:
    """Return the training rows and the held-out rows of a recipe's data section.

    Raises:
        NotFoundError: see `open_source`.
        DataError: see `open_source` and `tokenize`; or `data.eval_fraction` leaves no rows to train on or to hold out.
    """
    training = tokenize(open_source(data.source, split=data.split, subset=data.subset), tokenizer, data, data.limit)
    held_out = load_held_out(data, tokenizer)
    train = training.rows
    if data.eval_fraction is not None:
        conversations = training.facts.conversations
        train, held_out = split_by_conversation(train, conversations, data.eval_fraction, seed, data.eval_limit)
        if not len(train) or not len(held_out):
            missing = "hold out" if len(train) else "train on"
            raise DataError(f"data.eval_fraction: no rows are left to {missing}. Change it, or add conversations.")
    if data.rows == "packed":
        train = pack_rows(train, data.max_length)
    return PreparedRows(train=train, held_out=held_out, facts=training.facts)


def load_held_out(data: Data, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset | None:
    """Return the rows of `data.eval_source` or `data.eval_split`, or None where both are null."""
    if data.eval_source is None and data.eval_split is None:
        return None
    return tokenize(held_out_source(data), tokenizer, data, data.eval_limit).rows


def held_out_source(data: Data) -> Source:
    """Return the source of the held-out conversations; for `eval_fraction` this is the training source."""
    source = data.eval_source if data.eval_source is not None else data.source
    split = data.eval_split if data.eval_split is not None else data.split
    return open_source(source, split=split, subset=data.subset)
