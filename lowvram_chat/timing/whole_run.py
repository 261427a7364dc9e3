"""How long a whole run takes: its optimizer steps times the predicted time of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from lowvram_chat.data.rows import held_out_conversations
from lowvram_chat.recipe.schema import Recipe

KNOWN_ROWS: Mapping[tuple[str, str], int] = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): 23_110,
    ("HuggingFaceH4/ultrachat_200k", "train_gen"): 256_032,
    ("HuggingFaceH4/ultrachat_200k", "test_gen"): 28_304,
}
"""(dataset, split) -> its conversations. Source: the dataset's card on the Hugging Face hub."""


def rows_of(recipe: Recipe) -> int | None:
    """Return the number of training conversations; None if it is not known without reading the data.

    It is known for a local file of one conversation a line, and for the datasets in `KNOWN_ROWS`. Conversations that are held out
    by `data.eval_fraction` do not count.
    """
    data = recipe.data
    sources = [data.source] if isinstance(data.source, str) else list(data.source)
    counts = [_rows_of_source(source, data.split) for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    rows = sum(known) if data.limit is None else min(sum(known), data.limit)
    return rows - (held_out_conversations(rows, data.eval_fraction) if data.eval_fraction else 0)


def _rows_of_source(source: str, split: str) -> int | None:
    if (source, split) in KNOWN_ROWS:
        return KNOWN_ROWS[source, split]
    path = Path(source).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    return sum(1 for line in _lines(path) if line.strip())


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def steps_of(recipe: Recipe) -> int | None:
    """Return the optimizer steps of a run; None if the number of its rows is not known, as of packed or split conversations."""
    train = recipe.train
    if train.max_steps is not None:
        return train.max_steps
    is_known = recipe.data.rows != "packed" and recipe.data.overflow != "split"
    rows = rows_of(recipe) if is_known else None
    return None if rows is None else math.ceil(train.num_train_epochs * math.ceil(rows / train.effective_batch_size))
