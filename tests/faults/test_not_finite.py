"""Losses, weights and states that become NaN or infinite: the run stops, and what was good before is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from lowvram_chat import api, chat, sft
from lowvram_chat.errors import DivergedError
from lowvram_chat.training.finite import MAX_SKIPPED_STEPS, FiniteGuard
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.trainer import ChatTrainer
from tests.integration.test_resume import weights
from tests.runs import Bench, metrics

SETTINGS: dict[str, Any] = {"train__max_steps": 12, "train__save_steps": 3}
STEP = 8


def spoil_loss(trainer: ChatTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Return a loss that is NaN."""
    return loss * float("nan")


def infinite_loss(trainer: ChatTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Return a loss that is infinite."""
    return loss * float("inf")


def spoil_weight(trainer: ChatTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Make one weight NaN, as a broken memory would."""
    parameters = [parameter for parameter in trainer.trained_model.parameters() if parameter.requires_grad]
    parameters[-1].data.view(-1)[0] = float("inf")
    return loss


def spoil_state(trainer: ChatTrainer, loss: torch.Tensor) -> torch.Tensor:
    """Make one value of the optimizer's states infinite."""
    states = trainer._own_optimizer().state  # type: ignore[attr-defined]
    first = next(iter(states.values()))
    first["exp_avg_sq"].view(-1)[0] = float("inf")
    return loss


FAULTS: dict[str, Callable[[ChatTrainer, torch.Tensor], torch.Tensor]] = {
    "NaN loss": spoil_loss,
    "infinite loss": infinite_loss,
    "infinite weight": spoil_weight,
    "infinite state": spoil_state,
}


def inject(monkeypatch: pytest.MonkeyPatch, fault: Callable[[ChatTrainer, torch.Tensor], torch.Tensor]) -> None:
    """Let a fault happen in step `STEP` + 1."""
    original = ChatTrainer.compute_loss

    def compute_loss(self: ChatTrainer, *arguments: Any, **settings: Any) -> torch.Tensor:
        loss = original(self, *arguments, **settings)
        return fault(self, loss) if self.state.global_step == STEP else loss

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_at_its_last_good_checkpoint(
    fault: str,
    adapter: dict[str, Any] | None,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = SETTINGS | {"adapter": adapter}
    whole = bench.run("whole", **settings)
    with monkeypatch.context() as patch:
        inject(patch, FAULTS[fault])
        assert sft.main([str(bench.file("r", **settings))]) == 1
    error = capsys.readouterr().err
    assert "so the run was stopped and this state was not saved" in error
    assert "The last steps had these conversations: " in error
    assert "lower train.learning_rate (it was 0.005)" in error
    run = bench.folder / "r"
    assert not (run / "result.json").exists()
    assert not (run / ("adapter" if adapter is not None else "model")).exists()
    checkpoint = RunDir(run).last_checkpoint()
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-6"
    assert "NaN" not in (run / "metrics.jsonl").read_text(encoding="utf-8")
    api.train(bench.recipe("r", **settings), resume=True)  # the fault was the machine's
    assert all(torch.equal(weights(run)[key], value) for key, value in weights(whole).items())


def test_weights_are_looked_at_before_the_end_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, spoil_weight)
    with pytest.raises(DivergedError, match="of the weights are NaN or infinite"):
        api.train(bench.recipe("r", train__max_steps=STEP + 1, train__logging_steps=100))
    assert not (bench.folder / "r" / "model").exists()


def test_an_overflow_in_fp16_is_normal_and_many_in_a_row_are_not(bench: Bench) -> None:
    guard = FiniteGuard(bench.recipe("r"))
    for _ in range(3):
        for step in range(MAX_SKIPPED_STEPS):
            guard.after_step(step, was_skipped=True)
        guard.after_step(MAX_SKIPPED_STEPS, was_skipped=False)
    with pytest.raises(DivergedError, match="31 fp16 steps in a row overflowed"):
        for step in range(MAX_SKIPPED_STEPS + 1):
            guard.after_step(step, was_skipped=True)


def test_a_loss_that_is_not_finite_over_good_weights_is_only_logged(bench: Bench) -> None:
    FiniteGuard(bench.recipe("r")).check_logged(1, {"loss": float("nan")}, torch.nn.Linear(2, 2))


def test_the_steps_before_are_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, spoil_loss)
    with pytest.raises(DivergedError):
        api.train(bench.recipe("r", **SETTINGS))
    run: Path = bench.folder / "r"
    assert [line["step"] for line in metrics(run)][:STEP] == [*range(1, STEP + 1)]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_no_token_is_drawn_from_logits_that_are_not_finite(
    temperature: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = GPT2LMHeadModel.forward

    def overflows(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits[..., 5] = float("nan")
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", overflows)
    assert chat.main([str(bench.model), "--prompt", "hello", "--temperature", temperature]) == 2
    assert "the model's logits are NaN or infinite" in capsys.readouterr().err
