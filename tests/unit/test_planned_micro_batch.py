"""`train.micro_batch: planned`: the same rows a step, in the largest micro-batches that fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram_chat.planning import search
from lowvram_chat.planning.changes import apply_change
from lowvram_chat.planning.prediction import make_plan
from lowvram_chat.planning.search import planned_micro_batch
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.units import MIB


def test_a_planned_micro_batch_is_the_largest_that_fits_and_checkpoints_only_where_it_must(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(search, "SAFETY_MARGIN_BYTES", 0)
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "micro_batch": "planned"}
    shape = {"model_type": "gpt2", "n_layer": 8, "n_embd": 128, "n_head": 2, "vocab_size": 5000}
    (tmp_path / "config.json").write_text(json.dumps(shape))  # all that a plan needs
    tree = {"model": {"name": str(tmp_path)}, "train": rows, "data": {"max_length": 1024}}
    asked = Recipe.model_validate(tree)

    def peak(size: int, *, checkpointed: bool = False) -> int:
        cut = {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": 4 // size}
        return (
            make_plan(apply_change(asked, {**cut, "train.gradient_checkpointing": checkpointed})).on_card_bytes // MIB
            + 1
        )

    assert peak(1, checkpointed=True) < peak(1) < peak(2) < peak(4)
    for limit, size, checkpointed in ((peak(2), 2, False), (peak(1) - 2, None, True)):
        change = planned_micro_batch(apply_change(asked, {"memory.limit_mib": limit}), make_plan)
        train = apply_change(asked, change).train
        assert train.micro_batch == "given"
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 4
        assert size in (None, train.per_device_train_batch_size)
        assert train.gradient_checkpointing is checkpointed
    assert planned_micro_batch(Recipe(), make_plan) == {}
