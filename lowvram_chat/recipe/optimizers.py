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
    state_bytes: float
    """About how many bytes of states a parameter has, in a checkpoint. 8-bit optimizers keep 32-bit states of embeddings."""
    paged: bool = False
    """Whether its states are in CUDA unified memory, which the allocator does not count."""


ADAM = frozenset({"beta1", "beta2", "eps"})

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(optim="adamw_torch_fused", reads=ADAM, state_bytes=8),
    "adamw_unfused": Optimizer(optim="adamw_torch", reads=ADAM, state_bytes=8),
    "adamw_8bit": Optimizer(optim="adamw_bnb_8bit", reads=ADAM, state_bytes=4),
    "paged_adamw_8bit": Optimizer(optim="paged_adamw_8bit", reads=ADAM, state_bytes=4, paged=True),
    "lion_8bit": Optimizer(optim="lion_8bit", reads=frozenset({"beta1", "beta2"}), state_bytes=2),
    "adafactor": Optimizer(optim="adafactor", reads=frozenset(), state_bytes=1),
    "sgd": Optimizer(optim="sgd", reads=frozenset({"momentum"}), state_bytes=4),
}
"""Name in a recipe -> its properties."""
