"""Adapters: made from a recipe, loaded from a run, and folded into the base with a proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowvram_chat.errors import ModelError, did_you_mean
from lowvram_chat.model.fused_lora import fuse_adapters
from lowvram_chat.recipe.adapters import ADAPTERS
from lowvram_chat.recipe.schema import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers inside the blocks, in order: c_attn, c_proj, c_fc for GPT-2.

    The output head is left out: it is tied to the input embedding in GPT-2, and an adapter there merges wrongly.
    """
    head = model.get_output_embeddings()
    names = [
        name for name, layer in model.named_modules() if isinstance(layer, Conv1D | nn.Linear) and layer is not head
    ]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, on_cpu: bool = False) -> PeftModel:
    """Return the model with a fresh adapter; only the adapter trains, in float32. `on_cpu`: see `fuse_adapters`' `fold`.

    Raises:
        ModelError: a target layer that the model does not have.
    """
    known = linear_layers(model)
    targets = adapter.target_modules or known
    for name in targets:
        if name.rpartition(".")[2] not in known:
            raise ModelError(
                f"adapter.target_modules: '{name}' is no linear layer of this model.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            )
    settings: dict[str, Any] = dict(ADAPTERS[adapter.kind])
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
        **settings,
    )
    adapted: Any = get_peft_model(model, config)
    if adapter.fused:
        fuse_adapters(adapted, fold=on_cpu)
    return adapted  # type: ignore[no-any-return]


PROBE_FILE = "base_probe.json"


def base_probe(model: nn.Module) -> list[float]:
    """Return the first value of each bias and norm of the base: enough to tell two bases of one shape apart.

    One-dimensional parameters are never quantised, and no adapter kind of ours changes them.
    """
    named = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p for name, p in model.named_parameters()
    }
    return [
        named[name].detach().flatten()[0].item()
        for name in sorted(named)
        if named[name].dim() == 1 and "lora_" not in name
    ]


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Write an adapter under the base's name in the recipe: a path of this machine would help nobody."""
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / PROBE_FILE).write_text(json.dumps(base_probe(model)) + "\n", encoding="utf-8")


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the base with a saved adapter on it, ready for inference.

    Raises:
        ModelError: the adapter was made for another base.
    """
    probe = folder / PROBE_FILE
    if probe.is_file():
        wanted, found = torch.tensor(json.loads(probe.read_text(encoding="utf-8"))), torch.tensor(base_probe(base))
        if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-2, atol=1e-3):  # fp16 holds 1e-3
            raise ModelError(
                f"{folder}: this adapter was trained on another base model. Give the base it was trained on."
            )
    try:
        return PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder}: this adapter does not fit the base model ({reason}). Give the base that it was trained on."
        ) from None


@torch.no_grad()
def probe_logits(model: nn.Module, vocabulary: int, rows: int = 2, length: int = 32) -> torch.Tensor:
    """Return the (rows, length, V) fp32 logits of fixed random tokens: what two models are compared on."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    device = next(model.parameters()).device
    return model.eval()(input_ids=tokens.to(device)).logits.float().cpu()  # type: ignore[no-any-return]
