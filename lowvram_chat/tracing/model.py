"""Builds a recipe's model on the meta device: the classes, loss, substitutions and adapter of a run, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import AutoModelForCausalLM

from lowvram_chat.model.configs import config_for
from lowvram_chat.model.loading_errors import errors_explained, with_supported_attention
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import check_gradient_checkpointing, check_positions
from lowvram_chat.model.substitutions import fuse_gelu, set_dropout
from lowvram_chat.recipe.choices import portable_attention
from lowvram_chat.recipe.schema import Adapter, Model, Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LanguageModel: TypeAlias = "PreTrainedModel | PeftModel"
"""A causal language model, with or without an adapter."""

EQUIVALENT_ADAPTERS = {"pissa": "lora"}
"""Adapter kind -> a kind that takes the same memory. PiSSA differs only in its initial values, which need an SVD."""


def build_meta_model(recipe: Recipe, device: str = "meta", *, on_cpu: bool = False) -> LanguageModel:
    """Return the recipe's model in training mode, as `training.session.build_model` builds it, with random weights.

    `on_cpu`: with the variants that are fastest on a CPU.

    Raises:
        NotFoundError, ModelError: an unknown model, too few positions, or an adapter target that the model lacks.
    """
    with torch.device(device):
        base = _base_model(recipe.model, recipe.data.max_length)
        if recipe.train.gradient_checkpointing:
            check_gradient_checkpointing(base)
        attach_loss(base, fused=recipe.model.fused_loss, pad_vocabulary=recipe.model.pad_vocabulary, on_cpu=on_cpu)
        model = base if recipe.adapter is None else _add_adapter(base, recipe.adapter, on_cpu=on_cpu)
    return prepare_for_training(model, recipe)


def prepare_for_training(model: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Return the model as the Trainer prepares it for its first step."""
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.adapter is not None:
            model.enable_input_require_grads()
    return model.train()


def _base_model(settings: Model, max_length: int) -> PreTrainedModel:
    """Return the model without loss and adapter."""
    config = config_for(settings)
    check_positions(config, max_length, settings.name)
    if settings.dropout is not None:
        set_dropout(config, settings.dropout)

    def build(attention: str) -> PreTrainedModel:
        with errors_explained(settings.name, settings.name, "AutoModelForCausalLM", attention=attention):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, settings.dtype), attn_implementation=attention
            )
        return model

    # SDPA takes as much memory as the kernels of other packages, which need not be installed here.
    model = with_supported_attention(build, portable_attention(settings.attention), settings.name)
    if settings.load_in == "4bit":
        from lowvram_chat.tracing.four_bit import quantise

        quantise(model, getattr(torch, settings.dtype))
    if settings.fused_gelu:
        fuse_gelu(model)
    return model


def _add_adapter(base: PreTrainedModel, adapter: Adapter, *, on_cpu: bool) -> PeftModel:
    """Return the model with its adapter. Trained parameters are fp32, as `training.trainer` makes them."""
    from lowvram_chat.model.adapters import add_adapter

    kind = EQUIVALENT_ADAPTERS.get(adapter.kind, adapter.kind)
    model = add_adapter(base, adapter.model_copy(update={"kind": kind}), on_cpu=on_cpu)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
