"""The schema of recipes: seven frozen sections, checked together."""

from __future__ import annotations

from pydantic import model_validator

from lowvram_chat.recipe.conflicts import find_card_conflicts, find_conflicts, find_train_conflicts
from lowvram_chat.recipe.sections import (
    POSITIONS_OF_GPT2,
    Adapter,
    Card,
    Data,
    Memory,
    Model,
    OptimizerSection,
    Output,
    Section,
    Train,
)

__all__ = [
    "POSITIONS_OF_GPT2",
    "Adapter",
    "Card",
    "Data",
    "Memory",
    "Model",
    "OptimizerSection",
    "Output",
    "Recipe",
    "Section",
    "Train",
]


class Recipe(Section):
    """All settings of a run, as `python -m lowvram_chat.sft` takes them."""

    model: Model = Model()
    adapter: Adapter | None = None
    data: Data = Data()
    train: Train = Train()
    optimizer: OptimizerSection = OptimizerSection()
    memory: Memory = Memory()
    output: Output = Output()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        problems = [
            *find_conflicts(self.model, self.adapter, self.data),
            *find_card_conflicts(self.memory, self.train, self.model),
            *find_train_conflicts(self.train, self.optimizer),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
