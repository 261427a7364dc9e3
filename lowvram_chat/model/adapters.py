"""Low-rank adapters: creating, saving and loading them, and checking that an adapter belongs to its base model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowvram_chat.errors import ModelError, did_you_mean
from lowvram_chat.model.fingerprint import FINGERPRINT_FILE, Fingerprint, check_same_base
from lowvram_chat.model.fused_lora import fuse_adapters
from lowvram_chat.model.pretrained import resolve
from lowvram_chat.recipe.adapters import ADAPTERS
from lowvram_chat.recipe.schema import Adapter, Model

log = logging.getLogger(__name__)

ChatModel = PreTrainedModel | PeftModel
"""A base model, with or without an adapter."""


def base_model_of(model: ChatModel) -> PreTrainedModel:
    """Return the base model under an adapter, or the model itself if it has no adapter."""
    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")
"""Class names of bitsandbytes' linear layers."""


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a plain linear layer; subclasses, such as routers of experts, may return other things."""
    return type(layer) in (Conv1D, nn.Linear) or (
        isinstance(layer, nn.Linear) and type(layer).__name__ in QUANTISED_LAYERS
    )


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last part of each linear layer's name, in order and once each: c_attn, c_proj, c_fc for GPT-2.

    The output head is left out: GPT-2 ties it to the input embedding, and an adapter on it would merge wrongly.
    """
    head = model.get_output_embeddings()
    names = [name for name, layer in model.named_modules() if is_linear(layer) and layer is not head]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, on_cpu: bool = False) -> PeftModel:
    """Return the model with a new adapter. Only the adapter trains, in float32.

    `on_cpu` allows adapters to be folded into a copy of the weights; see `fuse_adapters`.

    Raises:
        ModelError: the model has no target layer of that name, or PEFT cannot adapt it.
    """
    try:
        adapted = get_peft_model(model, _lora_config(model, adapter))
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"adapter: PEFT cannot adapt this {model.config.model_type} ({reason}). Name other layers in adapter.target_modules, "
            "or use another kind of adapter."
        ) from None
    if adapter.fused and fuse_adapters(adapted, fold=on_cpu) == 0:
        log.warning("adapter.fused: none of PEFT's layers can be fused, so PEFT's own forward runs")
    return adapted


def _lora_config(model: PreTrainedModel, adapter: Adapter) -> LoraConfig:
    """Return PEFT's configuration of a recipe's adapter."""
    known = linear_layers(model)
    targets = adapter.target_modules or known
    for name in targets:
        if name.rpartition(".")[2] not in known:
            raise ModelError(
                f"adapter.target_modules: '{name}' is not a linear layer of this model.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            )
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
        **ADAPTERS[adapter.kind],
    )


def save_adapter(model: PeftModel, folder: Path, base_name: str, base: Fingerprint) -> None:
    """Save an adapter with the name and the fingerprint of its base.

    A folder or a built-in model is named by its absolute path, so that PEFT finds it from every directory of this machine.
    """
    path = Path(resolve(base_name))
    name = str(path.absolute()) if path.is_dir() else base_name
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / FINGERPRINT_FILE).write_text(base.to_json(), encoding="utf-8")


def load_adapter(base: PreTrainedModel, folder: Path, settings: Model) -> PeftModel:
    """Return the base model of `settings` with a saved adapter, ready for inference.

    Raises:
        ModelError: the adapter was trained on another base model, or tensors of it are missing.
    """
    _check_fingerprint(base, folder, settings)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder}: this adapter does not fit the base model ({reason}). Give the base model that it was trained on."
        ) from None
    check_adapter_tensors(adapted, folder)
    return adapted


def _check_fingerprint(base: PreTrainedModel, folder: Path, settings: Model) -> None:
    """Compare the base model with the fingerprint saved beside the adapter.

    Raises:
        ModelError: they differ, or the fingerprint is damaged.
    """
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        log.warning("%s: has no %s, so its base model is not checked", folder, FINGERPRINT_FILE)
        return
    try:
        saved = Fingerprint.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: is damaged ({error}). Copy the adapter folder again.") from None
    check_same_base(saved, base, settings, folder)


def check_adapter_tensors(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter whose file lacks tensors or has others: PEFT leaves missing ones as they were initialised.

    Raises:
        ModelError: with how many are missing and unknown.
    """
    wanted, found = set(get_peft_model_state_dict(model)), set(load_peft_weights(str(folder), device="cpu"))
    if wanted != found:
        raise ModelError(
            f"{folder}: {len(wanted - found)} of the adapter's {len(wanted)} tensors are missing from its file, and "
            f"{len(found - wanted)} are unknown. Copy the adapter folder again, or train it again."
        )


@torch.no_grad()
def probe_logits(model: nn.Module, vocabulary: int, rows: int = 2, length: int = 32) -> torch.Tensor:
    """Return the (rows, length, V) fp32 logits of fixed random tokens, to compare two models by."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    device = next(model.parameters()).device
    logits: torch.Tensor = model.eval()(input_ids=tokens.to(device)).logits
    return logits.float().cpu()
