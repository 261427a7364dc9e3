"""Tests of this folder run on the paper card alone: make papercard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests out where libpapercard.so is not preloaded."""
    is_test = collection_path.name.startswith("test_")
    return True if is_test and "libpapercard" not in os.environ.get("LD_PRELOAD", "") else None


@pytest.fixture(autouse=True)
def leftovers_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the checks that look at values: kernels compute nothing here, so that logits, losses and weights are leftovers.

    Switched off: finite weights, causality, isolation, the loss, the gradients, and the proof of a merge.
    """
    from lowvram_chat.exporting.proof import Proof

    for name in (
        "lowvram_chat.model.pretrained.check_finite",
        "lowvram_chat.training.model_setup.check_causal",
        "lowvram_chat.training.trainer.check_trainer_loss",
        "lowvram_chat.training.preflight.check_gradients",
    ):
        monkeypatch.setattr(name, lambda *_, **__: None)
    monkeypatch.setattr(Proof, "holds", lambda self, **_: True)
