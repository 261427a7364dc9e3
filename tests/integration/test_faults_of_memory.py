"""Memory that runs out in any phase of a run ends in advice; after a halving, nothing of the earlier session is alive."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import api, chat, evaluate, merge, sft
from lowvram_chat.model.device import choose_device
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.training import run as run_module
from lowvram_chat.training.trainer import ChatTrainer
from tests.emulated_fp16 import emulate_fp16
from tests.integration.test_out_of_memory import full_above
from tests.runs import Bench, curve, result

MOMENTS: dict[str, tuple[str, str, str]] = {
    "load": ("lowvram_chat.training.model_setup", "load_model", "while the model was loaded"),
    "fingerprint": ("lowvram_chat.training.model_setup", "fingerprint", "while the model was loaded"),
    "isolation": ("lowvram_chat.training.model_setup", "check_causal", "while the model was loaded"),
    "loss check": ("lowvram_chat.training.trainer", "check_trainer_loss", "in the checks before the first step"),
    "preflight": ("lowvram_chat.training.preflight", "run_longest_batch", "in the checks before the first step"),
    "evaluation": ("lowvram_chat.model.scoring", "_score", "in the evaluation"),
    "loss": ("lowvram_chat.model.loss", "summed_loss", ""),
    "backward": ("accelerate.Accelerator", "backward", "in the checks before the first step"),
    "optimizer": ("accelerate.optimizer.AcceleratedOptimizer", "step", "in training"),
    "save": ("lowvram_chat.training.session", "save_model", "while the model was saved"),
}
"""Moment -> (module or class, name of what fails there, what the message says)."""


def full(*_: object, **__: object) -> None:
    """Fail as a full card does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_device_is_advice_at_every_moment(
    moment: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, name, said = MOMENTS[moment]
    monkeypatch.setattr(f"{owner}.{name}", full)
    assert sft.main([str(bench.file("r", train__max_steps=2))]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert f"the device ran out of memory {said}" in told
    assert any(word in told for word in ("Add ", "Set ", "Use ", "Close "))


def test_answers_that_do_not_fit_are_left_out_and_the_run_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowvram_chat.training.samples.generate", full)
    assert sft.main([str(bench.file("r", train__max_steps=2, output__sample_prompts=["Hello?"]))]) == 0
    assert "no answers before the run (CUDA out of memory. Tried to allocate 2.00 GiB)" in capsys.readouterr().err


def test_an_evaluation_that_does_not_fit_goes_on_with_smaller_batches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_chat.model import loss as loss_module

    expected = result(bench.run("expected", train__max_steps=2))["held_out_loss_after"]
    original = loss_module.LossForward.__call__

    def forward(self: Any, *args: Any, **kwargs: Any) -> object:
        if not torch.is_grad_enabled() and kwargs["input_ids"].size(0) > 2 and "loss_positions" in kwargs:
            full()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loss_module.LossForward, "__call__", forward)
    settings = {"train__max_steps": 2, "train__per_device_eval_batch_size": 8, "train__per_device_train_batch_size": 2}
    run = bench.run("r", **settings | {"train__gradient_accumulation_steps": 2})
    assert result(run)["held_out_loss_after"] == pytest.approx(expected, rel=1e-5)


def sessions_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[weakref.ref[Any]]]:
    """Collect weak references to the parameters, gradients, states, model, optimizer and trainer of each session."""
    seen: list[list[weakref.ref[Any]]] = []
    original = ChatTrainer.compute_loss

    def compute_loss(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        optimizer = getattr(self.optimizer, "optimizer", None)
        states = [] if optimizer is None else [v for s in optimizer.state.values() for v in s.values()]
        held = [
            self,
            self.trained_model,
            *self.trained_model.parameters(),
            *(() if optimizer is None else (optimizer,)),
        ]
        held += [p.grad for p in self.trained_model.parameters() if p.grad is not None]
        seen.append([weakref.ref(one) for one in held + [v for v in states if isinstance(v, torch.Tensor)]])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_halving_nothing_of_the_earlier_session_is_alive(
    optimizer: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sessions_seen(monkeypatch)
    full_above(2, 4, monkeypatch)
    released: list[Callable[[], int]] = []
    original = run_module.release_memory

    def release_memory(device: torch.device) -> None:
        before = [one for call in seen for one in call]
        original(device)
        released.append(lambda: sum(one() is not None for one in before))
        assert sum(one() is not None for one in before) == 0

    monkeypatch.setattr(run_module, "release_memory", release_memory)
    bench.run("r", optimizer={"name": optimizer}, memory={"on_oom": "halve"}, train__save_steps=3, train__max_steps=6)
    assert len(released) == 1
    gc.collect()
    assert all(one() is None for call in seen for one in call)  # nor is the last one, once the run is over


def test_an_fp16_run_that_is_halved_has_the_losses_of_the_run_that_had_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_fp16(monkeypatch)
    settings: dict[str, Any] = {"train__precision": "fp16", "train__save_steps": 5}
    whole = curve(bench.run("whole", **settings))
    full_above(1, 7, monkeypatch)
    halved = curve(bench.run("halved", **settings, memory={"on_oom": "halve"}))
    assert max(abs(a - b) for a, b in zip(whole, halved, strict=True)) < 5e-3


def test_the_plan_of_a_halved_run_is_that_of_the_smaller_micro_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(2, 0, monkeypatch)
    halved = result(bench.run("halved", memory={"on_oom": "halve"}, train__max_steps=2))
    small = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 2, "train__max_steps": 2}
    expected = result(bench.run("small", memory={"on_oom": "halve"}, **small))
    assert halved["memory_plan"] == expected["memory_plan"]


def small_card(monkeypatch: pytest.MonkeyPatch, free_mib: int) -> None:
    """Pretend a graphics card with so much free memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_mib << 20, 4096 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_a_model_that_does_not_fit_the_card_is_opened_on_the_cpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_card(monkeypatch, 100)
    caplog.set_level("INFO")
    assert api.open_chat(tiny).opened.model.device.type == "cpu"
    assert "the graphics card has 100 MiB free and the model needs about" in caplog.text
    assert choose_device("auto", lambda: 99 << 20).type == "cuda"
    assert choose_device("cpu", lambda: 0).type == "cpu"


def test_cuda_without_a_card_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tiny), "--prompt", "Hi", "--device", "cuda"]) == 2
    assert "--device: no CUDA graphics card is usable here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "evaluate", "merge"])
def test_a_full_device_is_advice_in_every_command(
    command: str, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"chat": ["--prompt", "Hi"], "evaluate": ["--batch-size", "1"], "merge": ["--out", str(tmp_path / "m")]}
    main = {"chat": chat.main, "evaluate": evaluate.main, "merge": merge.main}[command]
    for moment in {
        "chat": ["lowvram_chat.model.saved.load_model", "lowvram_chat.model.chat_session.generate"],
        "evaluate": ["lowvram_chat.model.saved.load_model", "lowvram_chat.model.loss.summed_loss"],
        "merge": ["lowvram_chat.exporting.merge.load_model", "lowvram_chat.exporting.merge.probe_logits"],
    }[command]:
        with monkeypatch.context() as patch:
            patch.setattr(moment, full)
            assert main([str(lora_run), *words[command]]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)." in told
        assert "Close other programs" in told
    assert not list(tmp_path.glob("m*"))


def test_a_conversation_goes_on_after_an_answer_that_did_not_fit(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
    monkeypatch.setattr("lowvram_chat.model.chat_session.generate", full)
    assert chat.main([str(tiny)]) == 0
    assert "(The answer: out of memory" in capsys.readouterr().err
