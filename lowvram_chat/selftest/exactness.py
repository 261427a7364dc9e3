"""Are the package's own loss, gradients, activation and adapters what the libraries' are, on this device and in each type?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowvram_chat.data.rows import Collator, on_device
from lowvram_chat.model import flash_attention
from lowvram_chat.model.device import move_to_device
from lowvram_chat.model.document_attention import DOCUMENT_ATTENTION
from lowvram_chat.model.document_mask import use_attention_by_document
from lowvram_chat.model.flash_attention import FLASH_CAPABILITY
from lowvram_chat.model.fused_lora import fuse_adapters
from lowvram_chat.model.isolation import isolates_documents
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.scoring import autocast
from lowvram_chat.model.substitutions import fuse_gelu
from lowvram_chat.model.varlen_attention import VARLEN_ATTENTION
from lowvram_chat.selftest.check import Outcome, figure, skipped
from lowvram_chat.units import largest

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest accepted difference, relative to the norm of what the libraries compute. Measured on a CPU: 2e-6, 1.2e-2 and 1.6e-3."""
TOKENS, LABELLED = 96, 64
PACKED_DOCUMENTS = ((40, 30, 20), (3,) * 30)
"""Lengths of the documents of a packed row: those of the second are so many that attention on a card takes them in groups."""


def small_model(device: torch.device) -> GPT2LMHeadModel:
    """Return a random GPT-2 of two blocks on a device, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 1003, "n_positions": 128}
        no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(**shape, **no_dropout, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    move_to_device(model, device)
    return model


def precisions(device: torch.device) -> Iterator[str]:
    """Yield the precisions that a run on this device can have; fp16 and bf16 work under autocast on a CPU too."""
    yield "fp32"
    yield "fp16"
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        yield "bf16"


def batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Return two rows of random tokens, whose last tokens carry loss."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (TOKENS, TOKENS - 17):
        ids = torch.randint(1, 1003, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length - LABELLED) + ids[-LABELLED:]})
    collated = Collator(0)(rows)
    collated.pop("real_tokens")
    return {name: value.to(device) for name, value in collated.items()}


def fused_loss(device: torch.device) -> Outcome:
    """Compare loss and gradients of the fused loss with those of transformers' own loss."""
    inputs = batch(device)
    differences = {}
    for precision in precisions(device):
        ours, theirs = small_model(device), small_model(device)
        attach_loss(ours)
        with autocast(device.type, precision):
            loss = ours(**inputs)["loss"]
            expected = (
                theirs(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss * inputs["loss_positions"].numel()
            )
        loss.backward()
        expected.backward()
        of_loss = abs(float(loss.detach() - expected.detach())) / float(expected.detach())
        differences[precision] = largest([of_loss, gradient_difference(ours, theirs)])
    return compared(differences, "the fused loss and its gradients are those of transformers")


def fused_gelu(device: torch.device) -> Outcome:
    """Compare the logits and gradients with PyTorch's GELU kernel with those of transformers' `gelu_new`."""
    inputs = batch(device)
    differences = {}
    for precision in precisions(device):
        ours, theirs = small_model(device), small_model(device)
        assert fuse_gelu(ours)
        differences[precision] = difference_of(ours, theirs, inputs, precision)
    return compared(differences, "the fused activation is that of transformers")


def fused_lora(device: torch.device) -> Outcome:
    """Compare logits and gradients of the fused adapters with those of PEFT's own layers."""
    inputs = batch(device)
    differences = {}
    for precision in precisions(device):
        ours = with_adapter(small_model(device))
        theirs = copy.deepcopy(ours)
        assert fuse_adapters(ours)
        differences[precision] = difference_of(ours, theirs, inputs, precision)
    return compared(differences, "the fused adapters and their gradients are PEFT's")


def with_adapter(model: GPT2LMHeadModel) -> nn.Module:
    """Return the model with a LoRA adapter whose weights are not zero."""
    config = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def packed_isolation(device: torch.device) -> Outcome:
    """Return whether packed documents do not see each other, in the attention that a run with packed rows has."""
    model = small_model(device)
    isolated = isolates_documents(model)
    return Outcome(good=isolated, meaning="packed conversations do not see each other")


def document_attention(device: torch.device) -> Outcome:
    """Compare loss and gradients of packed rows with attention by document with those under a document mask."""
    on_card = device.type == "cuda"
    if on_card and torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return skipped("attention by document needs compute capability 8.0; packed rows run under a mask")
    if on_card and not flash_attention.is_built():
        return skipped("torch was built without FlashAttention, as on Windows; packed rows run under a mask")
    name = VARLEN_ATTENTION if on_card else DOCUMENT_ATTENTION
    differences = {
        precision: largest(_packed_difference(device, name, precision, lengths) for lengths in PACKED_DOCUMENTS)
        for precision in precisions(device)
        if precision != "fp32" or not on_card
    }
    return compared(differences, "attention by document and its gradients are those under a mask")


def _packed_difference(device: torch.device, attention: str, precision: str, documents: Sequence[int]) -> float:
    """Return the difference of the gradients of two packed rows of documents of these lengths."""
    row = batch(device)["input_ids"].flatten()[: sum(documents)].tolist()
    inputs = Collator(0)([{"input_ids": row, "labels": [-100, *row[1:]], "documents": list(documents)}] * 2)
    inputs.pop("real_tokens")
    ours, theirs = small_model(device), small_model(device)
    use_attention_by_document(ours, attention)
    for model in (ours, theirs):
        attach_loss(model)
        with autocast(device.type, precision):
            loss = model(**{name: on_device(value, device) for name, value in inputs.items()})["loss"]
        loss.backward()
    return gradient_difference(ours, theirs)


def difference_of(ours: nn.Module, theirs: nn.Module, inputs: dict[str, torch.Tensor], precision: str) -> float:
    """Return `gradient_difference` after a forward and backward pass of both models with transformers' own loss."""
    for model in (ours, theirs):
        with autocast(inputs["labels"].device.type, precision):
            loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        loss.backward()
    return gradient_difference(ours, theirs)


def gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Return the norm of the difference of all gradients, relative to the norm of theirs; infinity if none are finite."""
    pairs = [
        (mine.grad.float(), other.grad.float())
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True)
        if mine.grad is not None and other.grad is not None
    ]
    difference = sum(float((mine - other).square().sum()) for mine, other in pairs)
    norm = sum(float(other.square().sum()) for _, other in pairs)
    return (difference / norm) ** 0.5 if norm > 0 else float("inf")


def compared(differences: dict[str, float], meaning: str) -> Outcome:
    """Return the outcome of relative differences by precision."""
    good = all(value <= TOLERANCES[precision] for precision, value in differences.items())  # a NaN is not
    figures = {f"difference {name}": figure(value, "1") for name, value in differences.items() if value < float("inf")}
    return Outcome(good=good, meaning=meaning, figures=figures)
