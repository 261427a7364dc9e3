"""Every optimizer of the table takes real steps that lower the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import OptimizerSection
from tests.runs import Bench, curve, result

if TYPE_CHECKING:
    from pathlib import Path

RATES = {"lion_8bit": 1e-3, "sgd": 0.5}
"""Learning rates that suit an optimizer; 5e-3 suits the others."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss(name: str, bench: Bench) -> None:
    run = bench.run(name, optimizer={"name": name}, train__learning_rate=RATES.get(name, 5e-3))
    said = result(run)
    assert said["held_out_loss_after"] < said["held_out_loss_before"] - 0.1
    assert len(set(curve(run))) > 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_reads_only_settings_that_exist(name: str) -> None:
    assert OPTIMIZERS[name].reads <= set(OptimizerSection.model_fields)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("adamw", {"beta1": 0.5}),
        ("adamw_8bit", {"beta2": 0.9}),
        ("sgd", {"momentum": 0.9}),
        ("lion_8bit", {"beta1": 0.5}),
    ],
)
def test_a_setting_that_an_optimizer_reads_changes_the_run(name: str, setting: dict[str, float], bench: Bench) -> None:
    common = {"train__max_steps": 5, "train__learning_rate": RATES.get(name, 5e-3)}
    plain = bench.run("plain", optimizer={"name": name}, **common)
    changed = bench.run("changed", optimizer={"name": name} | setting, **common)
    assert curve(plain)[0] == curve(changed)[0]
    assert curve(plain)[-1] != curve(changed)[-1]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
def test_weight_decay_changes_the_run(name: str, bench: Bench) -> None:
    common = {"train__max_steps": 5, "train__learning_rate": RATES.get(name, 5e-3)}
    plain = bench.run("plain", optimizer={"name": name}, **common)
    decayed = bench.run("decayed", optimizer={"name": name, "weight_decay": 0.5}, **common)
    assert curve(plain)[-1] != curve(decayed)[-1]


def eight_bit_states(folder: Path) -> int:
    """Return how many state tensors of a checkpoint are held in 8 bits."""
    import torch

    states = torch.load(folder / "optimizer.pt", weights_only=False)["state"].values()
    held = [state.get("__bnb_optimizer_quant_state__", {}) for state in states]
    return sum(
        quantized[name].dtype == torch.uint8 for quantized in held for name in ("state1", "state2") if name in quantized
    )


@pytest.mark.parametrize(("name", "states"), [("adamw_8bit", 2), ("paged_adamw_8bit", 2), ("lion_8bit", 1)])
def test_an_8bit_optimizer_holds_8bit_states(name: str, states: int, bench: Bench) -> None:
    run = bench.run(name, optimizer={"name": name}, train__max_steps=2, train__save_steps=2)
    assert eight_bit_states(run / "checkpoints" / "checkpoint-2") >= 8 * states
