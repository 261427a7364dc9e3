"""The parameters whose gradients are compared before a run: enough of a model to find a step that trains it wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from lowvram_chat.model.adapters import ChatModel, base_model_of

Parameters = Mapping[str, nn.Parameter]


def compared_parameters(model: nn.Module) -> dict[str, Parameters]:
    """Return the trained parameters of the head, the first and the last block, by the name of the group."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks, layers = max(
        lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=("", nn.ModuleList())
    )
    head = base_model_of(cast("ChatModel", model)).get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()}
    groups: dict[str, Parameters] = {
        "the head": {name: parameter for name, parameter in trained.items() if id(parameter) in heads}
    }
    for number, title in {0: "the first block", len(layers) - 1: "the last block"}.items():
        prefix = f"{blocks}.{number}."
        groups[title] = {name: parameter for name, parameter in trained.items() if name.startswith(prefix)}
    return groups
