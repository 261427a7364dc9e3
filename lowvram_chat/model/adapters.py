"""Low-rank adapters: creating, saving and loading them, and checking that an adapter belongs to its base model."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowvram_chat.errors import ModelError, did_you_mean
from lowvram_chat.model.fingerprint import FINGERPRINT_FILE, Fingerprint, check_same_base
from lowvram_chat.model.fused_lora import fuse_adapters
from lowvram_chat.recipe.adapters import ADAPTERS
from lowvram_chat.recipe.schema import Adapter, Model

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

ChatModel = PreTrainedModel | PeftModel
"""A base model, with or without an adapter."""


def base_model_of(model: ChatModel) -> PreTrainedModel:
    """Return the base model under an adapter, or the model itself if it has no adapter."""
    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


ROUTERS = re.compile("Router|TopK|Gate")
"""Class names of linear layers that choose experts, and return more than a product."""


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a linear layer whose output is a product, as PEFT takes it."""
    return isinstance(layer, Conv1D | nn.Linear) and ROUTERS.search(type(layer).__name__) is None


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

    `base_name` is a hub id or an absolute path, so that PEFT finds it from every directory of this machine.
    """
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder), save_embedding_layers=False)
    adapter = _adapter_settings(folder)
    (folder / FINGERPRINT_FILE).write_text(replace(base, adapter=adapter).to_json(), encoding="utf-8")


def load_adapter(base: PreTrainedModel, folder: Path, settings: Model) -> PeftModel:
    """Return the base model of `settings` with a saved adapter, ready for inference.

    Raises:
        ModelError: the adapter was trained on another base model, or tensors of it are missing.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: has no {ADAPTER_WEIGHTS}. Copy the adapter folder again, or train it again.")
    _check_fingerprint(base, folder, settings)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder), torch_device=str(base.device))
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"{folder}: the adapter's weights are damaged ({error}). Copy the adapter folder again."
        ) from None
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
    if saved.adapter is not None and saved.adapter != _adapter_settings(folder):
        raise ModelError(
            f"{folder}: adapter_config.json has changed since the adapter was saved, so it would be another one. Restore it."
        )
    check_same_base(saved, base, settings, folder)


def _adapter_settings(folder: Path) -> str:
    """Return a digest of an adapter's configuration, but for where its base is.

    Raises:
        ModelError: it is damaged.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in ("base_model_name_or_path", "revision")}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}: adapter_config.json is damaged ({type(error).__name__}). Copy the adapter folder again."
        ) from None
    kept["target_modules"] = sorted(kept.get("target_modules") or [])
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def check_adapter_tensors(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter whose file lacks tensors or has others: PEFT leaves missing ones as they were initialised.

    Raises:
        ModelError: with how many are missing and unknown.
    """
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter's weights are missing or damaged ({error}).") from None
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{folder}: the adapter's tensor {name} holds values that are not finite. Train it again.")
    wanted, found = set(get_peft_model_state_dict(model)), set(weights)
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
