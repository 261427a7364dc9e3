"""A full device stops the run with advice, or halves the micro-batch and goes on with the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import sft
from lowvram_chat.training import preflight
from lowvram_chat.training import trainer as trainer_module
from lowvram_chat.training.halving import halve
from tests.runs import Bench

FULL: list[RuntimeError] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
"""What a full card raises: the allocator's own error, the driver's, and a library's that finds no room for itself."""


def full_above(rows: int, from_step: int, monkeypatch: pytest.MonkeyPatch, error: RuntimeError = FULL[0]) -> None:
    """Make a step of more than so many rows fail as a full card does, from an optimizer step on."""
    original = trainer_module.ChatTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if inputs["input_ids"].size(0) > rows and self.state.global_step >= from_step:
            raise type(error)(*error.args)  # a new one: it keeps the frames alive through which it went
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.ChatTrainer, "compute_loss", compute_loss)


def losses(run: Path) -> dict[int, float]:
    """Return step -> training loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("error", FULL, ids=("allocator", "driver", "cublas"))
def test_a_full_device_stops_with_advice_and_an_intact_run_folder(
    error: RuntimeError, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_above(2, 6, monkeypatch, error)
    assert sft.main([str(bench.file("r", train__save_steps=5))]) == 2
    told = capsys.readouterr().err
    assert "train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2" in told
    assert "Traceback" not in told
    assert (bench.folder / "r" / "checkpoints" / "checkpoint-5" / "trainer_state.json").is_file()


def test_another_error_is_no_full_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    full_above(2, 6, monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        bench.run("r", memory={"on_oom": "halve"})


@pytest.mark.parametrize("from_step", [0, 7])
def test_halving_gives_the_losses_of_the_run_that_had_room(
    from_step: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = losses(bench.run("whole", train__save_steps=5))
    full_above(1, from_step, monkeypatch)
    halved = losses(bench.run("halved", train__save_steps=5, memory={"on_oom": "halve"}))
    assert halved.keys() == whole.keys()
    # fp32, the same rows summed in another order: 2e-6 was the largest difference seen
    assert max(abs(halved[step] - whole[step]) for step in whole) < 1e-4


def test_a_single_row_that_does_not_fit_ends_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_above(0, 0, monkeypatch)
    assert sft.main([str(bench.file("r", memory={"on_oom": "halve"}))]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_halving_keeps_the_effective_batch(bench: Bench) -> None:
    recipe = bench.recipe("r", train__per_device_train_batch_size=6, train__gradient_accumulation_steps=3)
    while (smaller := halve(recipe)) is not None:
        recipe = smaller
        train = recipe.train
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 18
    assert recipe.train.per_device_train_batch_size == 1


def test_a_device_that_is_full_before_the_first_step_does_not_continue_the_run_that_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"train__save_steps": 2, "memory": {"on_oom": "halve"}, "train__max_steps": 4}
    expected = losses(bench.run("expected", **settings))
    bench.run("r", **settings | {"train__learning_rate": 1e-4, "train__seed": 7})
    original, calls = preflight.run_longest_batch, iter(range(9))

    def full_once(*args: Any, **kwargs: Any) -> int:
        if next(calls) == 0:
            raise FULL[0]
        return original(*args, **kwargs)

    monkeypatch.setattr(preflight, "run_longest_batch", full_once)
    assert sft.main([str(bench.file("r", **settings)), "--overwrite"]) == 0
    halved = losses(bench.folder / "r")
    assert halved.keys() == expected.keys()
    assert max(abs(halved[step] - expected[step]) for step in expected) < 1e-4
