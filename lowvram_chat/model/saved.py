"""Saved models by name, opened for chat or evaluation: a run folder, an adapter folder, a model folder or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from lowvram_chat.errors import ModelError, NotFoundError
from lowvram_chat.model.adapters import ChatModel, load_adapter
from lowvram_chat.model.device import choose_device, move_to_device
from lowvram_chat.model.out_of_memory import advised
from lowvram_chat.model.pretrained import check_vocabulary, load_config, load_model, load_tokenizer, positions_of
from lowvram_chat.recipe.choices import portable_attention
from lowvram_chat.recipe.schema import Model, Recipe
from lowvram_chat.recipe.yaml_file import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_FILE = "adapter_config.json"
"""File that marks an adapter folder."""
ROOM_BYTES = 768 << 20
"""Memory on a card beside the weights, for the CUDA context, a tile of logits and the activations of a batch. Our estimate."""
DEVICE_ADVICE = {
    "cuda": "Add --device cpu, or close other programs that use the card.",
    "cpu": "Close other programs, or use a smaller model.",
}
"""Device -> what to do when its memory runs out."""
DEFAULT_POSITIONS = 1024
"""Number of tokens given at once to a model that has no limit."""


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode on its device, with its tokenizer, and the recipe of its run if there is one."""

    model: Any
    """A `ChatModel` that can generate text."""
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None

    @property
    def positions(self) -> int:
        """Number of tokens that the model can see at once."""
        return positions_of(self.model.config) or DEFAULT_POSITIONS


def open_model(name: str, device: str = "auto") -> OpenedModel:
    """Return the model of this name, in float32 on a CPU and in float16 on CUDA; `device` is one of `DEVICES`.

    Raises:
        NotFoundError: as `load_model`, or the run has not finished.
        ModelError: as `load_model` and `load_adapter`.
        DeviceError: as `choose_device`.
        OutOfMemory: the model does not fit the device.
    """
    folder, recipe = _locate(name)
    is_adapter = folder is not None and (folder / ADAPTER_FILE).is_file()
    base = base_of_adapter(folder) if folder is not None and is_adapter else Model(name=str(folder or name))
    chosen = choose_device(device, lambda: _needed_bytes(base))
    with advised(name, DEVICE_ADVICE[chosen.type]):
        return _open(name, folder, recipe, base, chosen)


def float32_bytes(model: Model) -> int:
    """Return the size of a model's weights in float32, from its configuration alone."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(load_config(model.name, model.revision))
    return sum(4 * int(parameter.numel()) for parameter in built.parameters())


def _needed_bytes(model: Model) -> int:
    """Return about what a model needs on a card to answer and to be scored: its weights in fp16, and room for one batch."""
    return int(1.1 * float32_bytes(model) / 2) + ROOM_BYTES


def _open(name: str, folder: Path | None, recipe: Recipe | None, base: Model, device: torch.device) -> OpenedModel:
    """Return a model on its device; `base` is the base of an adapter, or the model itself."""
    dtype = "float16" if device.type == "cuda" else "float32"
    source = name if folder is None else str(folder)
    model: ChatModel
    if folder is not None and (folder / ADAPTER_FILE).is_file():
        base = base.model_copy(update={"dtype": dtype})
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(source) if has_tokenizer else load_tokenizer(base.name, base.revision)
        model = load_adapter(load_model(base), folder, base)
    else:
        tokenizer = load_tokenizer(source)
        attention = portable_attention(recipe.model.attention) if recipe else "sdpa"
        model = load_model(Model.model_validate({"name": source, "dtype": dtype, "attention": attention}))
    check_vocabulary(tokenizer, model.config, name)
    move_to_device(model, device)
    return OpenedModel(model.eval(), tokenizer, recipe)


def _locate(name: str) -> tuple[Path | None, Recipe | None]:
    """Return the folder with the weights (None if the name is not a local folder), and the run's recipe if there is one.

    Raises:
        NotFoundError: the run folder has neither an adapter nor a model.
    """
    path = Path(name)
    if not path.is_dir():
        return None, None
    if not (path / "recipe.yaml").is_file():
        return path, None
    recipe = load_recipe(path / "recipe.yaml")
    folder = path / ("model" if recipe.adapter is None else "adapter")
    if not folder.is_dir():
        raise NotFoundError(
            f"{name}: this run has not finished, so it has no {folder.name}. Continue it with sft --resume."
        )
    return folder, recipe


def base_of_adapter(adapter: Path) -> Model:
    """Return the base model of an adapter: as its run names it, or else as the adapter's own configuration does.

    A run may name a folder relative to the directory that it was started in; the adapter has its absolute path.

    Raises:
        ModelError: the adapter's configuration is damaged.
    """
    try:
        config = json.loads((adapter / ADAPTER_FILE).read_text(encoding="utf-8"))
        saved = Model(name=config["base_model_name_or_path"], revision=config.get("revision"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{adapter}: {ADAPTER_FILE} is damaged ({type(error).__name__}). Copy the adapter folder again."
        ) from None
    recipe_file = adapter.parent / "recipe.yaml"
    if not recipe_file.is_file():
        return saved
    model = load_recipe(recipe_file).model
    is_there = model.name.startswith("builtin:") or Path(model.name).is_dir()
    name = model.name if is_there or not Path(saved.name).is_dir() else saved.name
    return Model(name=name, revision=model.revision, attention=portable_attention(model.attention))
