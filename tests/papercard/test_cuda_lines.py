"""Every line of the package that needs CUDA runs once: training, memory, commands. Values mean nothing here."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import api, chat, doctor, evaluate, merge, sft
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.training.trainer import ChatTrainer
from tests.runs import Bench, metrics, result

FP16: dict[str, Any] = {"train__precision": "fp16", "train__max_steps": 3, "train__dataloader_num_workers": 0}
LORA = {"kind": "lora", "r": 8}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": LORA},
    "dora": {"adapter": LORA | {"kind": "dora"}},
    "qlora": {"adapter": LORA, "model__load_in": "4bit", "model__dtype": "float16"},
    "packed": {"data__rows": "packed"},
    "checkpointed": {"train__gradient_checkpointing": True},
    "bf16": {"train__precision": "bf16"},
    "fp32": {"train__precision": "fp32"},
}


def test_the_device_is_the_paper_card() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.get_device_name().startswith("Paper card")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_trains_and_compares_its_peak_with_its_plan(kind: str, bench: Bench) -> None:
    planned = result(bench.run("r", **FP16 | KINDS[kind]))["memory_plan"]
    assert planned["measured_reserved_bytes"] > 0
    # A tiny run: two segments of 2 MiB more or less are some per cent.
    assert abs(planned["predicted_reserved_bytes"] - planned["measured_reserved_bytes"]) < 32 << 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_and_is_resumed(optimizer: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ChatTrainer.compute_loss

    def compute_loss(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    settings = FP16 | {"optimizer": {"name": optimizer}, "train__max_steps": 4, "train__save_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChatTrainer, "compute_loss", compute_loss)
        bench.run("r", **settings)
    paged: list[bool] = []

    def look(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = [s["state1"] for s in self._own_optimizer().state.values() if "state1" in s]  # type: ignore[attr-defined]
        paged.extend(getattr(state, "is_paged", False) for state in states if state.numel() >= 100_000)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "compute_loss", look)
    api.train(bench.recipe("r", **settings), resume=True)
    assert len(metrics(bench.folder / "r")) == 4
    if OPTIMIZERS[optimizer].paged:
        assert paged
        assert all(paged)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_fp16_run_goes_on_in_another_precision(precision: str, bench: Bench) -> None:
    bench.run("r", **FP16 | {"train__save_steps": 2, "train__max_steps": 2})
    settings = FP16 | {"train__save_steps": 2, "train__max_steps": 4, "train__precision": precision}
    assert api.train(bench.recipe("r", **settings), resume=True)["steps"] == 4


def test_a_real_out_of_memory_error_halves_the_micro_batch_and_frees_the_earlier_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = ChatTrainer.compute_loss
    held: list[int] = []

    def compute_loss(self: ChatTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if inputs["input_ids"].size(0) > 2 and self.state.global_step == 2:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        if inputs["input_ids"].size(0) == 2 and not held:
            held.append(torch.cuda.memory_allocated())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    settings = FP16 | {"optimizer": {"name": "adamw_8bit"}, "train__save_steps": 2, "memory": {"on_oom": "halve"}}
    halved = bench.run("halved", **settings)
    assert "out of memory: continuing with train.per_device_train_batch_size=2" in caplog.text
    gc.collect()
    torch.cuda.empty_cache()
    alone: list[int] = []

    def look(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        alone.append(torch.cuda.memory_allocated())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "compute_loss", look)
    bench.run("alone", **FP16, optimizer={"name": "adamw_8bit"}, train__per_device_train_batch_size=2)
    assert held[0] < 1.5 * alone[0]  # twice as much, if the dead session's weights were still there
    assert result(halved)["memory_plan"]["measured_reserved_bytes"] > 0


def test_the_cap_of_a_run_holds(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.main([str(bench.file("r", **FP16, memory={"limit_mib": 340})), "--force"]) == 2
    told = capsys.readouterr().err
    assert "the device ran out of memory" in told
    assert "Traceback" not in told
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_commands_work_on_the_card(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(bench.run("r", **FP16, adapter=LORA))
    assert merge.main([run, "--device", "cuda"]) == 0
    for command in (chat.main, evaluate.main):
        words = ["--prompt", "Hi", "--max-new-tokens", "2"] if command is chat.main else ["--batch-size", "2"]
        assert command([run, "--device", "cuda", *words]) == 0
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert any("Paper card" in finding["found"] for finding in found)
