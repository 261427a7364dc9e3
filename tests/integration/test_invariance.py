"""The same step is the same step, however it is divided: TRL's invariants, held by our trainer.

Source of the idea: TRL's invariance tests of per-step loss and gradient norm.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs import Bench, metrics

DIVISIONS = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}
LORA: dict[str, Any] = {"adapter": {"kind": "lora", "r": 4}, "train__learning_rate": 2e-2}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "checkpointed": {"train__gradient_checkpointing": True},
    "lora, checkpointed": LORA | {"train__gradient_checkpointing": True},
    "packed": {"data__rows": "packed"},
    "lora, packed": LORA | {"data__rows": "packed"},
    "compiled": {"train__compile": "if_possible"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_how_it_is_divided(kind: str, bench: Bench) -> None:
    steps = {}
    for name, (rows, accumulated) in DIVISIONS.items():
        run = bench.run(
            name,
            train__per_device_train_batch_size=rows,
            train__gradient_accumulation_steps=accumulated,
            train__max_steps=4,
            **KINDS[kind],
        )
        steps[name] = [(line["loss"], line["grad_norm"]) for line in metrics(run) if "loss" in line]
    for name in ("4x2", "1x8"):
        for (loss, norm), (expected_loss, expected_norm) in zip(steps[name], steps["8x1"], strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-5)
            assert norm == pytest.approx(expected_norm, rel=2e-4)
