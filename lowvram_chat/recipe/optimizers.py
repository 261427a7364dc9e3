"""The optimizers a recipe can name: one row, one choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer: its name in transformers and which of the recipe's settings it reads."""

    optim: str
    """Value of `TrainingArguments.optim`."""
    reads: frozenset[str]
    """Fields of the recipe's `optimizer` section that this optimizer uses besides `name` and `weight_decay`."""
    bits: int = 32
    """Bits of one state value of a large tensor; tensors under 4,096 elements and embeddings stay 32-bit."""
    states: int = 2
    """State tensors held for each trained tensor (Adafactor: factored, so less than one)."""
    paged: bool = False
    """Whether the states live in CUDA unified memory, outside the allocator's count."""


ADAM = frozenset({"beta1", "beta2", "eps"})

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(optim="adamw_torch_fused", reads=ADAM),
    "adamw_unfused": Optimizer(optim="adamw_torch", reads=ADAM),
    "adamw_8bit": Optimizer(optim="adamw_bnb_8bit", reads=ADAM, bits=8),
    "paged_adamw_8bit": Optimizer(optim="paged_adamw_8bit", reads=ADAM, bits=8, paged=True),
    "lion_8bit": Optimizer(optim="lion_8bit", reads=frozenset({"beta1", "beta2"}), bits=8, states=1),
    "adafactor": Optimizer(optim="adafactor", reads=frozenset(), states=0),
    "sgd": Optimizer(optim="sgd", reads=frozenset({"momentum"}), states=1),
}
