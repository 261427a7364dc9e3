"""Builds a recipe's optimizer, of the class and with the settings that the Hugging Face Trainer gives it.

PyTorch's optimizers are built on the traced parameters. The constructors of bitsandbytes' optimizers read values, so they
run on the meta model, and the optimizer is repointed afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypedDict

import torch
from torch import nn

from lowvram_chat.private_names import check_private_names
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import OptimizerSection, Recipe
from lowvram_chat.tracing.materialise import Materialised, repoint
from lowvram_chat.tracing.recorder import TraceRecorder

NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters without weight decay. Source: transformers/trainer.py, `get_decay_parameter_names`."""
MIN_PAGED_ELEMENTS = 100_000
"""Size from which a paged state is in unified memory. Source: bitsandbytes/optim/optimizer.py, `get_state_buffer`."""
HOST_MEMORY = "outside"
"""Category of storages in unified memory, which a trace of the device leaves out."""

OptimizerFactory = Callable[[Materialised], torch.optim.Optimizer]
"""Returns the optimizer, given the tensors that moved to the traced device."""


class ParameterGroup(TypedDict):
    """Parameters with the same weight decay."""

    params: list[nn.Parameter]
    weight_decay: float


class OptimizerClass(NamedTuple):
    """The class of an optimizer with its settings, except for parameters and learning rate."""

    kind: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, object]

    def build(self, groups: list[ParameterGroup], learning_rate: float) -> torch.optim.Optimizer:
        """Return an optimizer of these parameters."""
        return self.kind(groups, lr=learning_rate, **self.settings)


def prepare_optimizer(recipe: Recipe, model: nn.Module) -> OptimizerFactory:
    """Return a factory for the optimizer, to be called after the (meta) model has moved to the traced device."""
    chosen = OPTIMIZER_CLASSES[OPTIMIZERS[recipe.optimizer.name].optim](recipe.optimizer)
    rate, weight_decay = recipe.train.learning_rate, recipe.optimizer.weight_decay
    if not chosen.kind.__module__.startswith("bitsandbytes"):
        return lambda _: chosen.build(parameter_groups(model, weight_decay), rate)
    optimizer = chosen.build(parameter_groups(model, weight_decay), rate)
    _keep_embeddings_in_32_bits(optimizer, model)

    def repointed(moved: Materialised) -> torch.optim.Optimizer:
        repoint(optimizer, moved)
        return optimizer

    return repointed


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Return the trained parameters in the Trainer's two groups: with weight decay, and without (biases and norms)."""
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    without_decay = {
        name for name, _ in trained if NO_DECAY_NAMES.search(name.lower()) or f"{name.rpartition('.')[0]}." in norms
    }
    return [
        {"params": [p for name, p in trained if name not in without_decay], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in without_decay], "weight_decay": 0.0},
    ]


def label_states(optimizer: torch.optim.Optimizer, recipe: Recipe, recorder: TraceRecorder) -> None:
    """Tell the recorder which storages are optimizer states, and which of these are in unified memory."""
    paged = OPTIMIZERS[recipe.optimizer.name].paged
    on_device: list[torch.Tensor] = []
    on_host: list[torch.Tensor] = []
    for parameter, state in optimizer.state.items():
        for value in _tensors(state):
            is_paged = paged and min(parameter.numel(), value.numel()) >= MIN_PAGED_ELEMENTS
            (on_host if is_paged else on_device).append(value)
    recorder.label(on_device, "optimizer state")
    recorder.label(on_host, HOST_MEMORY)


def _tensors(state: Mapping[str, object]) -> Iterable[torch.Tensor]:
    """Return the tensors of one parameter's state."""
    return (value for value in state.values() if isinstance(value, torch.Tensor))


def _keep_embeddings_in_32_bits(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Keep the states of embeddings in 32 bits, as the Trainer does.

    The Trainer does so through bitsandbytes' global manager, which would remember object ids beyond this trace.
    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    check_private_names("bitsandbytes.optim.optimizer.Optimizer8bit.get_config")
    assert isinstance(optimizer, Optimizer8bit)
    original: Callable[[int, int, dict[str, object]], dict[str, object]] = optimizer.get_config
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    positions = {
        (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) in embeddings
    }

    def get_config(gindex: int, pindex: int, group: dict[str, object]) -> dict[str, object]:
        config = original(gindex, pindex, group)
        return {**config, "optim_bits": 32} if (gindex, pindex) in positions else config

    vars(optimizer)["get_config"] = get_config  # shadows the method, for this optimizer only


def _adamw(section: OptimizerSection) -> OptimizerClass:
    return OptimizerClass(torch.optim.AdamW, {"betas": (section.beta1, section.beta2), "eps": section.eps})


def _adamw_fused(section: OptimizerSection) -> OptimizerClass:
    return OptimizerClass(torch.optim.AdamW, {**_adamw(section).settings, "fused": True})


def _adamw_8bit(section: OptimizerSection, *, paged: bool) -> OptimizerClass:
    from bitsandbytes.optim.adamw import AdamW

    return OptimizerClass(AdamW, {**_adamw(section).settings, "optim_bits": 8, "is_paged": paged})


def _lion_8bit(section: OptimizerSection) -> OptimizerClass:
    from bitsandbytes.optim.lion import Lion

    return OptimizerClass(Lion, {"betas": (section.beta1, section.beta2), "optim_bits": 8, "is_paged": False})


def _adafactor(_: OptimizerSection) -> OptimizerClass:
    from transformers.optimization import Adafactor

    return OptimizerClass(Adafactor, {"scale_parameter": False, "relative_step": False})


def _sgd(section: OptimizerSection) -> OptimizerClass:
    return OptimizerClass(torch.optim.SGD, {"momentum": section.momentum})


OPTIMIZER_CLASSES: Mapping[str, Callable[[OptimizerSection], OptimizerClass]] = {
    "adamw_torch_fused": _adamw_fused,
    "adamw_torch": _adamw,
    "adamw_bnb_8bit": partial(_adamw_8bit, paged=False),
    "paged_adamw_8bit": partial(_adamw_8bit, paged=True),
    "lion_8bit": _lion_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
"""`TrainingArguments.optim` -> class and settings. A test compares them with the Trainer's own."""
