"""Decides which conversations an evaluation scores, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from lowvram_chat.errors import UsageError
from lowvram_chat.recipe.schema import Data
from lowvram_chat.recipe.yaml_file import describe_problems, load_recipe

Settings = Mapping[str, str | int | float]
"""Fields of `recipe.schema.Data` and their values."""


def evaluation_data(model: str, data: Sequence[str], settings: Settings) -> tuple[Data, bool]:
    """Return the data section to score on, and whether the row length is the model's own choice.

    Settings take the place of the run's own; `data` names other conversations than those that the run held out.

    Raises:
        UsageError: there is nothing to score on, or a setting is wrong.
    """
    recipe_file = Path(model) / "recipe.yaml"
    own = load_recipe(recipe_file).data if recipe_file.is_file() else None
    section = {} if own is None else own.model_dump()
    if data:
        split = settings.get("split")
        section |= {"eval_source": list(data), "eval_fraction": None, "eval_limit": None}
        section |= {"eval_split": None if split == "train" else split}  # files have no splits, and are refused with one
        section |= {"format": None, "split": split or "train"}
    elif own is None or (own.eval_source is None and own.eval_split is None and own.eval_fraction is None):
        raise UsageError(f"{model}: has no held-out conversations of its own. Name some: evaluate {model} chats.jsonl")
    else:
        settings = {name: value for name, value in settings.items() if name != "split"}
    try:
        return Data.model_validate(section | dict(settings)), own is None and "max_length" not in settings
    except ValidationError as error:
        raise UsageError(describe_problems(error, "evaluate")) from None
