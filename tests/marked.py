"""Reads rows as they are trained: the text of each, with [[ ]] around what carries loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.data.preview import Preview, make_preview
from lowvram_chat.recipe.schema import Data
from tests.samples import write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview_of(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Preview:
    """Return the preview of a file, with all its rows; bad rows are counted, not refused."""
    return make_preview(Data(source=str(path), **settings), tokenizer, seed=0, rows=1000)


def marked(preview: Preview) -> list[str]:
    """Return the text of each row with its loss marked."""
    return [
        "".join(f"[[{piece.text}]]" if piece.carries_loss else piece.text for piece in row.pieces)
        for row in preview.rows
    ]


def marked_rows(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> list[str]:
    """Return rows as they are trained, where each can be used.

    Raises:
        AssertionError: a row cannot be used; with the problems.
    """
    preview = preview_of(write_jsonl(folder / "rows.jsonl", rows), tokenizer, **settings)
    assert not preview.facts.bad_rows, preview.facts.bad_examples
    return marked(preview)


def problem_of(folder: Path, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    """Return why a row cannot be used."""
    preview = preview_of(write_jsonl(folder / "rows.jsonl", [row]), tokenizer, **settings)
    [example] = preview.facts.bad_examples
    return example
