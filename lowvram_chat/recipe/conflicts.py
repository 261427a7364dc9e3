"""Finds settings that exclude each other or have no effect together."""

from __future__ import annotations

from collections.abc import Iterator

from lowvram_chat.recipe.card import card_of
from lowvram_chat.recipe.choices import AUTO
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.sections import Adapter, Data, Memory, Model, OptimizerSection, Train


def find_conflicts(model: Model, adapter: Adapter | None, data: Data) -> Iterator[str]:
    """Yield a message for each conflict of model, adapter and data: the setting, what is wrong, and what to do."""
    yield from _weight_conflicts(model, adapter)
    yield from _data_conflicts(data)


def _weight_conflicts(model: Model, adapter: Adapter | None) -> Iterator[str]:
    """Yield a message for each setting of the weights that the adapter section, or its absence, rules out."""
    if model.load_in == "4bit" and adapter is None:
        yield (
            "model.load_in: 4-bit weights cannot be trained themselves. Add an adapter section, or set model.load_in=null."
        )
    if model.load_in == "4bit" and adapter is not None and adapter.kind == "pissa":
        yield (
            "adapter.kind: pissa is initialised from the base weights, which 4-bit storage does not keep exactly. "
            "Set adapter.kind=lora."
        )
    if adapter is None and model.dtype != "float32":
        yield (
            f"model.dtype: {model.dtype} weights cannot be trained under autocast. Set model.dtype=float32, or add an adapter."
        )


def _data_conflicts(data: Data) -> Iterator[str]:
    """Yield a message for each group of data settings that exclude each other."""
    if sum(value is not None for value in (data.eval_source, data.eval_split, data.eval_fraction)) > 1:
        yield "data: eval_source, eval_split and eval_fraction exclude each other. Keep one."
    if data.rows == "packed" and data.attention_mask:
        yield (
            "data.attention_mask: packed conversations are told apart by their positions, which a mask would override. "
            "Leave it out."
        )


FLASH_CAPABILITY = (8, 0)
"""Compute capability from which on a card computes in bf16 and has FlashAttention-2: Ampere."""


def find_card_conflicts(memory: Memory, train: Train, model: Model) -> Iterator[str]:
    """Yield a message for a card that is both named and described, or that cannot do what the recipe wants."""
    card = memory.card
    if card is not None and memory.gpu != AUTO:
        yield "memory: gpu and card exclude each other. Keep one."
    if card is not None and card.usable_mib is not None and card.usable_mib > card.memory_mib:
        yield f"memory.card.usable_mib: {card.usable_mib} is more than memory_mib, {card.memory_mib}. Correct one of them."
    if _wants_flash(model) and train.precision == "fp32":
        yield (
            f"model.attention: {model.attention} computes in half precision only. Set train.precision=fp16, or "
            "model.attention=sdpa."
        )
    if card is not None or memory.gpu != AUTO:
        yield from find_unsupported(memory, train, model)


def find_unsupported(memory: Memory, train: Train, model: Model) -> Iterator[str]:
    """Yield a message for each setting that the card lacks."""
    card = card_of(memory)
    if card.compute_capability >= FLASH_CAPABILITY:
        return
    has = "{}.{}".format(*card.compute_capability)
    if train.precision == "bf16":
        yield f"train.precision: bf16 needs compute capability 8.0, and {card.title} has {has}. Set train.precision=fp16."
    if _wants_flash(model):
        yield (
            f"model.attention: {model.attention} needs compute capability 8.0, and {card.title} has {has}. Set "
            "model.attention=sdpa."
        )


def _wants_flash(model: Model) -> bool:
    return model.attention == "flash_attention_2" or "/flash-attn" in model.attention


def find_train_conflicts(train: Train, optimizer: OptimizerSection) -> Iterator[str]:
    """Yield a message for each training or optimizer setting that has no effect."""
    if train.fp16_accumulation and train.precision != "fp16":
        yield (
            f"train.fp16_accumulation: it has no effect on {train.precision} products. Leave it out, or set "
            "train.precision=fp16."
        )
    for name in ("beta1", "beta2", "eps", "momentum"):
        if name in optimizer.model_fields_set and name not in OPTIMIZERS[optimizer.name].reads:
            yield f"optimizer.{name}: {optimizer.name} does not use it. Leave it out."
