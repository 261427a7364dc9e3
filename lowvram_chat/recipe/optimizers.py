"""The optimizers that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer: its name in transformers and the settings of the recipe that it uses."""

    optim: str
    """The value of `TrainingArguments.optim`."""
    reads: frozenset[str]
    """Fields of the recipe's `optimizer` section that it uses, besides `name` and `weight_decay`."""
    paged: bool = False
    """Whether its states are in CUDA unified memory, which the allocator does not count."""


ADAM = frozenset({"beta1", "beta2", "eps"})

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(optim="adamw_torch_fused", reads=ADAM),
    "adamw_unfused": Optimizer(optim="adamw_torch", reads=ADAM),
    "adamw_8bit": Optimizer(optim="adamw_bnb_8bit", reads=ADAM),
    "paged_adamw_8bit": Optimizer(optim="paged_adamw_8bit", reads=ADAM, paged=True),
    "lion_8bit": Optimizer(optim="lion_8bit", reads=frozenset({"beta1", "beta2"})),
    "adafactor": Optimizer(optim="adafactor", reads=frozenset()),
    "sgd": Optimizer(optim="sgd", reads=frozenset({"momentum"})),
}
"""Name in a recipe -> its properties."""
