"""A recipe's model on the meta device: the same classes, loss, substitutions and adapter as in a run, without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowvram_chat.model.configs import config_for
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import check_positions
from lowvram_chat.model.substitutions import dropout_settings, fuse_gelu
from lowvram_chat.recipe.schema import Model, Recipe

EQUIVALENT_ADAPTERS = {"pissa": "lora"}
"""Adapter kind -> the one that takes the same memory; PiSSA differs in its first values only, which need an SVD."""
EQUIVALENT_ATTENTION = {"flash_attention_2": "sdpa"}
"""Attention -> the one that takes the same memory and does not need the flash-attn package here."""


def build_meta_model(recipe: Recipe, device: str = "meta") -> Any:
    """Returns the recipe's model with random weights, in training mode, as `train.session.build_model` makes it.

    Raises:
        NotFoundError, ModelError: an unknown model, too few positions, or an adapter target that the model lacks.
    """
    with torch.device(device):
        model = _base(recipe.model, recipe.data.max_length)
        attach_loss(model, fused=recipe.model.fused_loss, pad_vocabulary=recipe.model.pad_vocabulary)
        if recipe.adapter is not None:
            model = _adapted(model, recipe)
    return prepare_for_training(model, recipe)


def prepare_for_training(model: Any, recipe: Recipe) -> Any:
    """Returns the model as the Trainer prepares it for its first step."""
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.adapter is not None:
            model.enable_input_require_grads()
    return model.train()


def _base(settings: Model, max_length: int) -> Any:
    config = config_for(settings)
    check_positions(config, max_length, settings.name)
    if settings.dropout is not None:
        for name, value in dropout_settings(config, settings.dropout).items():
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=EQUIVALENT_ATTENTION.get(settings.attention, settings.attention),
    )
    if settings.load_in == "4bit":
        from lowvram_chat.tracing.four_bit import quantise

        quantise(model, getattr(torch, settings.dtype))
    if settings.fused_gelu:
        fuse_gelu(model)
    return model


def _adapted(model: Any, recipe: Recipe) -> Any:
    """The model under its adapter; what trains is float32, as `train.trainer` sees to."""
    from lowvram_chat.model.adapters import add_adapter

    assert recipe.adapter is not None
    kind = recipe.adapter.kind
    model = add_adapter(model, recipe.adapter.model_copy(update={"kind": EQUIVALENT_ADAPTERS.get(kind, kind)}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
