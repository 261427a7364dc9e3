"""fp16 runs on a CPU by emulation: losses, overflows, checkpoints, and going on in another precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import api, sft
from lowvram_chat.training.trainer import ChatTrainer
from tests.emulated_fp16 import emulate_fp16
from tests.runs import Bench, curve, metrics

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, 8-bit optimizer": {"optimizer": {"name": "adamw_8bit"}},
    "full, own loss": {"model__fused_loss": False},
    "lora": {"adapter": {"kind": "lora", "dropout": 0.1}},
    "qlora": {"adapter": {"kind": "lora", "r": 8}, "model__load_in": "4bit"},
    "dora": {"adapter": {"kind": "dora", "r": 8}},
    "packed": {"data__rows": "packed"},
    "accumulated": {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4},
    "checkpointed": {"train__gradient_checkpointing": True},
}
"""Kind of run -> its settings."""

OVERFLOWING = 2.0**40
"""A scale at which every gradient overflows fp16, until the scaler has halved it some twenty times."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_fp16(monkeypatch)


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    [file] = [*run.glob("model/model.safetensors"), *run.glob("adapter/adapter_model.safetensors")]
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_has_the_loss_of_fp32(kind: str, bench: Bench) -> None:
    settings = KINDS[kind] | {"train__max_steps": 8, "train__max_grad_norm": 0.5}
    half = curve(bench.run("half", train__precision="fp16", **settings))
    single = curve(bench.run("single", train__precision="fp32", **settings))
    # The largest difference seen is 2e-3, of the packed and the 8-bit runs; a loss scaled twice is thousands away.
    assert max(abs(a - b) for a, b in zip(half, single, strict=True)) < 0.01


@pytest.mark.parametrize("kind", ["full", "full, 8-bit optimizer", "lora"])
def test_an_overflowing_step_is_skipped_and_the_run_recovers(
    kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_fp16(monkeypatch, scale=OVERFLOWING)
    run = bench.run(
        "r", **KINDS[kind] | {"train__precision": "fp16", "train__max_steps": 40, "train__learning_rate": 5e-3}
    )
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # NaN is no JSON
    overflowed = [line["grad_norm"] is None for line in lines if "loss" in line]
    first = overflowed.index(False)
    assert 10 < first < 30
    assert sum(overflowed[first:]) <= 2  # the scale stays close to the largest that fits
    losses = curve(run)
    assert max(losses[:first]) - min(losses[:first]) < 0.5  # the same weights on other rows
    assert losses[-1] < min(losses[:first])


@pytest.mark.parametrize("kind", ["full", "full, 8-bit optimizer", "lora", "qlora", "packed"])
def test_a_resumed_fp16_run_equals_the_uninterrupted_one(
    kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2^24 overflows in the first steps, so that the state of the scaler differs from a new one's.
    emulate_fp16(monkeypatch, scale=2.0**24)
    settings = KINDS[kind] | {"train__precision": "fp16", "train__max_steps": 12, "train__save_steps": 5}
    whole = bench.run("whole", **settings)
    broken = interrupted_after(7, bench, monkeypatch, **settings)
    api.train(bench.recipe("broken", **settings), resume=True)
    assert curve(broken) == curve(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name]), name


def interrupted_after(step: int, bench: Bench, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    """Return the folder of a run that Ctrl-C stopped after a step."""
    original = ChatTrainer.compute_loss

    def compute_loss(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    recipe = bench.recipe("broken", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChatTrainer, "compute_loss", compute_loss)
        api.train(recipe, overwrite=True)
    return Path(recipe.output.dir)


@pytest.mark.parametrize(("before", "after"), [("fp16", "fp32"), ("fp16", "bf16"), ("fp32", "fp16")])
def test_a_run_goes_on_in_another_precision(
    before: str, after: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"train__save_steps": 5, "train__max_steps": 12}
    reference = curve(bench.run("reference", train__precision="fp32", **settings))
    broken = interrupted_after(7, bench, monkeypatch, train__precision=before, **settings)
    assert sft.main([str(bench.file("broken", train__precision=after, **settings)), "--resume"]) == 0
    assert f"resuming with train.precision = {after} (was {before})" in capsys.readouterr().err
    assert len(metrics(broken)) == 12
    assert max(abs(a - b) for a, b in zip(curve(broken), reference, strict=True)) < 0.05
