"""The optimizer of a recipe, of the class and with the settings that the Hugging Face Trainer gives it.

torch's optimizers are built on the traced parameters; bitsandbytes' read values when they are made, so they are built
on the meta model and repointed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import OptimizerSection, Recipe
from lowvram_chat.tracing.materialise import Materialised, repoint
from lowvram_chat.tracing.recorder import TraceRecorder

NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names that weight decay passes over. Source: transformers/trainer.py, `get_decay_parameter_names`."""
MIN_PAGED_ELEMENTS = 100_000
"""Values from which a paged state lives in unified memory. Source: bitsandbytes/optim/optimizer.py, `get_state_buffer`."""

OptimizerFactory = Callable[[Materialised], torch.optim.Optimizer]


def prepare_optimizer(recipe: Recipe, model: nn.Module) -> OptimizerFactory:
    """Returns what makes the optimizer once the (meta) model has moved onto the traced card."""
    make = OPTIMIZER_FACTORIES[OPTIMIZERS[recipe.optimizer.name].optim]
    settings = {**make(recipe.optimizer), "lr": recipe.train.learning_rate}
    kind = settings.pop("kind")
    if kind.__module__.startswith("bitsandbytes"):
        optimizer = kind(parameter_groups(model, recipe.optimizer.weight_decay), **settings)
        _keep_embeddings_in_32_bits(optimizer, model)
        return partial(_repointed, optimizer)
    return lambda _: kind(parameter_groups(model, recipe.optimizer.weight_decay), **settings)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trained parameters in the Trainer's two groups: those that decay, and biases and norms."""
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    fixed = {
        name for name, _ in trained if NO_DECAY_NAMES.search(name.lower()) or f"{name.rpartition('.')[0]}." in norms
    }
    return [
        {"params": [p for name, p in trained if name not in fixed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in fixed], "weight_decay": 0.0},
    ]


def label_states(optimizer: torch.optim.Optimizer, recipe: Recipe, recorder: TraceRecorder) -> None:
    """Tells the recorder which storages are optimizer states, and which of them a card never holds."""
    states = [(parameter, value) for parameter, state in optimizer.state.items() for value in _values(state)]
    paged = OPTIMIZERS[recipe.optimizer.name].paged
    outside = [value for parameter, value in states if paged and parameter.numel() >= MIN_PAGED_ELEMENTS]
    of_size = {id(value) for value in outside if value.numel() >= MIN_PAGED_ELEMENTS}
    recorder.label((value for _, value in states if id(value) not in of_size), "optimizer state")
    recorder.label((value for _, value in states if id(value) in of_size), HOST_MEMORY)


HOST_MEMORY = "outside"
"""Category of storages that live in unified memory: a trace of the card leaves them out."""


def _values(state: dict[str, Any]) -> Iterable[torch.Tensor]:
    return (value for value in state.values() if isinstance(value, torch.Tensor))


def _repointed(optimizer: torch.optim.Optimizer, moved: Materialised) -> torch.optim.Optimizer:
    repoint(optimizer, moved)
    return optimizer


def _keep_embeddings_in_32_bits(optimizer: Any, model: nn.Module) -> None:
    """As the Trainer does through bitsandbytes' global manager, which would remember ids beyond this trace."""
    plain = optimizer.get_config
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    places = {
        (row, column)
        for row, group in enumerate(optimizer.param_groups)
        for column, parameter in enumerate(group["params"])
        if any(parameter is weight for weight in embeddings)
    }

    def get_config(gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = plain(gindex, pindex, group)
        return {**config, "optim_bits": 32} if (gindex, pindex) in places else config

    optimizer.get_config = get_config


def _adam(section: OptimizerSection) -> dict[str, Any]:
    return {"betas": (section.beta1, section.beta2), "eps": section.eps}


def _bitsandbytes(name: str, section: OptimizerSection, *, paged: bool = False) -> dict[str, Any]:
    from bitsandbytes import optim

    settings = _adam(section) if name == "AdamW" else {"betas": (section.beta1, section.beta2)}
    return {"kind": getattr(optim, name), **settings, "optim_bits": 8, "is_paged": paged}


def _adafactor(section: OptimizerSection) -> dict[str, Any]:
    from transformers.optimization import Adafactor

    return {"kind": Adafactor, "scale_parameter": False, "relative_step": False}


OPTIMIZER_FACTORIES: dict[str, Callable[[OptimizerSection], dict[str, Any]]] = {
    "adamw_torch_fused": lambda section: {"kind": torch.optim.AdamW, **_adam(section), "fused": True},
    "adamw_torch": lambda section: {"kind": torch.optim.AdamW, **_adam(section)},
    "adamw_bnb_8bit": partial(_bitsandbytes, "AdamW"),
    "paged_adamw_8bit": partial(_bitsandbytes, "AdamW", paged=True),
    "lion_8bit": partial(_bitsandbytes, "Lion"),
    "adafactor": _adafactor,
    "sgd": lambda section: {"kind": torch.optim.SGD, "momentum": section.momentum},
}
"""`TrainingArguments.optim` -> class and settings (a test compares them with the Trainer's own)."""
