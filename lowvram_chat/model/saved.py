"""A trained thing by name, ready to talk or to be scored: a run folder, an adapter, a model folder, a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowvram_chat.errors import NotFoundError
from lowvram_chat.model.adapters import load_adapter
from lowvram_chat.model.pretrained import load_model, load_tokenizer, positions_of
from lowvram_chat.recipe.schema import Model, Recipe
from lowvram_chat.recipe.yaml_file import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_FILE = "adapter_config.json"
DEFAULT_POSITIONS = 1024
"""Tokens that a model without a bound is shown at once."""


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode on its device, with its tokenizer, and its run's recipe if it has one."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None

    @property
    def positions(self) -> int:
        """Tokens the model can see at once."""
        return positions_of(self.model.config) or DEFAULT_POSITIONS


def open_model(name: str) -> OpenedModel:
    """Return what a name stands for, in float32 on a CPU and float16 on CUDA.

    Raises:
        NotFoundError, ModelError: see `load_model`, `load_adapter`; a run that has not finished.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "float16" if device.type == "cuda" else "float32"
    folder, recipe = _locate(name)
    place = name if folder is None else str(folder)
    tokenizer = load_tokenizer(place)
    if folder is not None and (folder / ADAPTER_FILE).is_file():
        model: Any = load_adapter(load_model(_base(folder).model_copy(update={"dtype": dtype})), folder)
    else:
        model = load_model(Model.model_validate({"name": place, "dtype": dtype}))
    return OpenedModel(model.to(device).eval(), tokenizer, recipe)


def _locate(name: str) -> tuple[Path | None, Recipe | None]:
    """Return the folder that holds the weights (None: not a local folder) and the run's recipe.

    Raises:
        NotFoundError: a run folder with neither adapter nor model in it.
    """
    path = Path(name)
    if not path.is_dir():
        return None, None
    if not (path / "recipe.yaml").is_file():
        return path, None
    recipe = load_recipe(path / "recipe.yaml")
    folder = path / ("model" if recipe.adapter is None else "adapter")
    if not folder.is_dir():
        raise NotFoundError(f"{name}: this run has not finished, so it has no {folder.name}. Go on with sft --resume.")
    return folder, recipe


def _base(adapter: Path) -> Model:
    """Return the base model of an adapter: by the run's recipe beside it, else by the adapter's own word."""
    recipe = adapter.parent / "recipe.yaml"
    if recipe.is_file():
        model = load_recipe(recipe).model
        return Model(name=model.name, revision=model.revision)
    config = json.loads((adapter / ADAPTER_FILE).read_text(encoding="utf-8"))
    return Model(name=config["base_model_name_or_path"], revision=config.get("revision"))
