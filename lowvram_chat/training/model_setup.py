"""Builds the model that is trained, and saves it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lowvram_chat.model import flash_attention
from lowvram_chat.model.adapters import add_adapter, save_adapter
from lowvram_chat.model.compilation import compile_blocks
from lowvram_chat.model.fingerprint import Fingerprint, fingerprint
from lowvram_chat.model.isolation import check_causal, isolate_documents
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import absolute_name, check_gradient_checkpointing, load_config, load_model
from lowvram_chat.model.saved_form import complete_config, save_tokenizer
from lowvram_chat.model.substitutions import DROPOUT_SETTINGS
from lowvram_chat.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TrainedModel = PreTrainedModel | PeftModel


CHANGED_FOR_TRAINING = ("use_cache", "router_aux_loss_coef", *DROPOUT_SETTINGS)
"""Settings of a model's config that the Trainer, SFTTrainer or `model.dropout` set for training."""


@dataclass(frozen=True)
class BuiltModel:
    """A model that is ready for training, and the fingerprint of the base that it was built from."""

    model: TrainedModel
    base: Fingerprint
    base_name: str
    """Hub id, or the absolute path of the base's folder, which may be gone at the end of the run."""
    original_config: Mapping[str, object]
    """Settings of the base's config that training changes."""


def build_model(recipe: Recipe, device: torch.device, *, on_cpu: bool = False) -> BuiltModel:
    """Return the recipe's model with its loss attached and its adapter, if it has one.

    `on_cpu`: use the variants that are fastest on a CPU. They take memory that no plan counts.

    Raises:
        NotFoundError, ModelError: the model cannot be loaded, or lacks what the recipe asks for.
    """
    settings = recipe.model
    model = load_model(settings, device=device)
    base = fingerprint(model, settings)  # before the adapter: PiSSA changes the base's weights
    if recipe.train.gradient_checkpointing:
        check_gradient_checkpointing(model)
    attach_loss(model, fused=settings.fused_loss, pad_vocabulary=settings.pad_vocabulary, on_cpu=on_cpu)
    original = load_config(settings.name, settings.revision)
    return BuiltModel(
        model if recipe.adapter is None else add_adapter(model, recipe.adapter, on_cpu=on_cpu),
        base,
        absolute_name(settings.name),
        {name: getattr(original, name) for name in CHANGED_FOR_TRAINING if hasattr(original, name)},
    )


def build_checked_model(recipe: Recipe, device: torch.device, *, compiled: bool) -> BuiltModel:
    """Return the model as it is trained on this device, after checking that it is causal and isolates packed documents.

    Raises:
        NotFoundError, ModelError: the model cannot be loaded, or fails a check.
    """
    on_cpu = device.type == "cpu"
    built = build_model(recipe, device, on_cpu=on_cpu)
    check_causal(built.model, device, recipe.train.precision)
    if recipe.data.rows == "packed":
        by_document = _attention_by_document(recipe, built.model, device, compiled=compiled)
        isolate_documents(built.model, device, recipe.train.precision, by_document)
    if compiled:
        compile_blocks(built.model)
    return built


def _attention_by_document(
    recipe: Recipe, model: TrainedModel, device: torch.device, *, compiled: bool
) -> Literal["cpu", "cuda"] | None:
    """Return the device whose attention by document a run with packed rows uses; None: it uses a document mask."""
    if device.type != "cuda":
        # A compiled model needs fixed shapes, which documents of varying length do not have.
        return "cpu" if recipe.model.document_attention and not compiled else None
    capability = torch.cuda.get_device_capability(device)
    reason = flash_attention.why_no_varlen(recipe, model.config, capability, has_flash=flash_attention.is_built())
    if reason is None:
        return "cuda"
    log.info("packed rows: attention runs under a document mask, because %s", reason)
    return None


def save_model(built: BuiltModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter or the model, with its tokenizer and chat template."""
    if isinstance(built.model, PeftModel):
        save_adapter_of(built, folder)
    else:
        restore_config(built)
        built.model.save_pretrained(str(folder))
        complete_config(folder)
    save_tokenizer(tokenizer, folder)


def restore_config(built: BuiltModel) -> None:
    """Put back the settings that a run changes in a model's config."""
    for name, value in built.original_config.items():
        setattr(built.model.config, name, value)


def save_adapter_of(built: BuiltModel, folder: Path) -> None:
    """Write the adapter of a model."""
    assert isinstance(built.model, PeftModel)
    save_adapter(built.model, folder, built.base_name, built.base)


def save_without_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write what a saved model has beside its weights."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
