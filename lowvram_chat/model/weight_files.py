"""Looks at a model folder's weights before they are loaded: an index may name pickles, and a config.json may describe far more
than there is, with which transformers would fill the memory with random weights."""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lowvram_chat.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_LAYERS = 1000
"""Most layers of a model. The deepest published language models have fewer than 200."""
MAX_RATIO = 2.5
"""Parameters of a model for each saved one. Two and a bit: a head of its own may be saved as the embeddings."""


def check_index(folder: Path, name: str) -> None:
    """Refuse an index that names anything but safetensors files of its folder: transformers would unpickle a `.bin` there.

    Raises:
        ModelError: with the index and the file that it names.
    """
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{name}: {index.name} is damaged. Download the model again, or save it again.") from None
        for file in files:
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or "\\" in file
                or not file.endswith(".safetensors")
            ):
                raise ModelError(
                    f"{name}: {index.name} names {file!r}, which is no safetensors file of this folder. Pickled weights can run "
                    "code, so they are not loaded. Download the model again, or save it again."
                )


def check_layers(config: PreTrainedConfig, name: str) -> None:
    """Refuse a number of layers that would take hours to build.

    Raises:
        ModelError: there are more than `MAX_LAYERS`.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ModelError(f"{name}: config.json has {layers:,} layers, more than {MAX_LAYERS:,}. Correct config.json.")


def check_size(config: PreTrainedConfig, folder: Path, name: str) -> None:
    """Refuse a configuration that has far more parameters than the saved weights. A damaged file is left to the loader.

    Raises:
        ModelError: with both numbers.
    """
    saved = _saved_parameters(folder)
    if not saved:
        return
    with torch.device("meta"):
        built = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters()
        )
    if built > MAX_RATIO * saved:
        raise ModelError(
            f"{name}: config.json describes {built:,} parameters, and the weights have {saved:,}. Download the model again, or "
            "save it again."
        )


def _saved_parameters(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files; 0 if a file is damaged."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except Exception:  # safetensors raises its own and the system's; the loader explains them
            return 0
    return total
