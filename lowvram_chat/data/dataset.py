"""Loads the training rows and the held-out rows of a recipe's data section."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_chat.data.facts import Facts
from lowvram_chat.data.packing import pack_rows
from lowvram_chat.data.rows import split_by_conversation
from lowvram_chat.data.sources import Source, check_splits, open_source
from lowvram_chat.data.tokenize import tokenize
from lowvram_chat.errors import DataError
from lowvram_chat.recipe.schema import Data
from lowvram_chat.units import count

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a recipe, and counts of what its training source held."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    """None where the recipe holds nothing out."""
    facts: Facts
    in_both: int = 0
    """Held-out conversations that are trained on, too."""
    fingerprint: str = ""
    """Digest of the training rows' content and order."""


def load_rows(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedRows:
    """Return the training rows and the held-out rows of a recipe's data section.

    Raises:
        NotFoundError: see `open_source`.
        DataError: see `open_source` and `tokenize`; or `data.eval_fraction` leaves no rows to train on or to hold out.
    """
    check_splits(data.source if data.eval_source is None else data.eval_source, data.eval_split)
    training = tokenize(open_source(data.source, split=data.split, subset=data.subset), tokenizer, data, data.limit)
    held_out = load_held_out(data, tokenizer)
    train = training.rows
    if data.eval_fraction is not None:
        conversations = training.facts.conversations
        train, held_out = split_by_conversation(train, conversations, data.eval_fraction, seed, data.eval_limit)
        if not len(train) or not len(held_out):
            missing = "hold out" if len(train) else "train on"
            raise DataError(f"data.eval_fraction: no rows are left to {missing}. Change it, or add conversations.")
    in_both = count_in_both(train, held_out)
    if in_both:
        log.warning(
            "%s that are held out are trained on, too, so the held-out loss says too little",
            count(in_both, "conversation"),
        )
    digest = _digest_of(train)
    if data.rows == "packed":
        train = pack_rows(train, data.max_length)
    return PreparedRows(train=train, held_out=held_out, facts=training.facts, in_both=in_both, fingerprint=digest)


def _digest_of(rows: datasets.Dataset) -> str:
    """Return a digest of the conversations of rows and of the rows' lengths, in their order."""
    import numpy

    columns = (numpy.asarray(rows[name][:], dtype=numpy.int64) for name in ("digest", "length"))
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()[:32]


def count_in_both(train: datasets.Dataset, held_out: datasets.Dataset | None) -> int:
    """Return the number of held-out conversations whose text is also that of a training conversation."""
    if held_out is None:
        return 0
    trained = set(train["digest"][:])
    conversations = dict(zip(held_out["conversation"][:], held_out["digest"][:], strict=True))
    return sum(digest in trained for digest in conversations.values())


def load_held_out(data: Data, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset | None:
    """Return the rows of `data.eval_source` or `data.eval_split`, or None where both are null."""
    if data.eval_source is None and data.eval_split is None:
        return None
    return tokenize(held_out_source(data), tokenizer, data, data.eval_limit).rows


def held_out_source(data: Data, *, sample: int | None = None) -> Source:
    """Return the source of the held-out conversations; for `eval_fraction` this is the training source.

    `sample`: as for `open_source`.

    Raises:
        DataError: `eval_split` is given for a file; or as `open_source`.
        NotFoundError: as `open_source`.
    """
    source = data.eval_source if data.eval_source is not None else data.source
    split = data.eval_split if data.eval_split is not None else data.split
    check_splits(source, data.eval_split)
    return open_source(source, split=split, subset=data.subset, sample=sample)
