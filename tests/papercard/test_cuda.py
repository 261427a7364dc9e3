"""Every line of the package that only CUDA runs, on the paper card: control flow and memory; values mean nothing there."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase

from lowvram_chat import bench as bench_command
from lowvram_chat import chat, doctor, evaluate, merge, sft
from lowvram_chat.training import run as run_module
from lowvram_chat.training.bitsandbytes_states import PAGED_STATES
from lowvram_chat.training.trainer import ChatTrainer
from tests.runs import Bench, metrics, result

COMMON = {
    "train__dataloader_num_workers": 0,
    "train__compile": False,
    "train__max_steps": 3,
    "train__precision": "fp16",
    "memory": {"on_oom": "stop"},
}
LORA = {"adapter": {"kind": "lora", "r": 4, "alpha": 8}}
FOUR_BIT = LORA | {"model__load_in": "4bit", "model__dtype": "float16"}
TERABYTE = 1 << 40

RUNS: dict[str, dict[str, Any]] = {
    "full fp16": {},
    "full bf16": {"train__precision": "bf16"},
    "full fp32": {"train__precision": "fp32"},
    "checkpointed": {"train__gradient_checkpointing": True},
    "8-bit": {"optimizer__name": "adamw_8bit"},
    "paged": {"optimizer__name": "paged_adamw_8bit"},
    "lion": {"optimizer__name": "lion_8bit"},
    "lora": LORA,
    "dora": {"adapter": {"kind": "dora", "r": 4, "alpha": 8}},
    "4-bit": FOUR_BIT,
    "4-bit paged": FOUR_BIT | {"optimizer__name": "paged_adamw_8bit"},
}


def fill(*_: object, **__: object) -> None:
    """Ask the card for more than it has: torch's own allocator raises the error."""
    torch.empty(TERABYTE, dtype=torch.uint8, device="cuda")


def train(bench: Bench, name: str, *words: str, **settings: Any) -> int:
    """Run sft with a recipe and return its exit code."""
    return sft.main([str(bench.file(name, **COMMON | settings)), *words])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_trains_saves_and_compares_its_peak_with_its_plan(kind: str, bench: Bench) -> None:
    assert train(bench, "r", **RUNS[kind]) == 0
    found = result(bench.folder / "r")
    assert found["steps"] == 3
    assert 0 < found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]
    assert found["memory_plan"]["error_percent"] > -5  # the plan is the worst of several runs, and these rows are short


@pytest.mark.parametrize("kind", ["8-bit", "paged", "4-bit paged"])
def test_a_resumed_run_has_its_states_where_they_were(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    paged: list[set[bool]] = []
    original = ChatTrainer._load_optimizer_and_scheduler

    def load(self: ChatTrainer, checkpoint: str | None) -> None:
        original(self, checkpoint)
        states = [state for state in vars(self._own_optimizer())["state"].values() if PAGED_STATES[0] in state]
        large = [state[PAGED_STATES[0]] for state in states if state[PAGED_STATES[0]].numel() >= 100_000]
        paged.append({bool(getattr(state, "is_paged", False)) for state in large})

    monkeypatch.setattr(ChatTrainer, "_load_optimizer_and_scheduler", load)
    large = {"adapter": {"kind": "lora", "r": 512, "alpha": 8}} if kind == "4-bit paged" else {}
    assert train(bench, "r", **RUNS[kind] | large | {"train__save_steps": 2, "train__max_steps": 2}) == 0
    assert train(bench, "r", "--resume", **RUNS[kind] | large | {"train__save_steps": 2, "train__max_steps": 4}) == 0
    assert paged == [{kind != "8-bit"}]
    assert result(bench.folder / "r")["steps"] == 4


def test_a_run_goes_on_in_fp32_after_fp16(bench: Bench) -> None:
    assert train(bench, "r", train__save_steps=2, train__max_steps=2) == 0
    assert train(bench, "r", "--resume", train__save_steps=2, train__max_steps=4, train__precision="fp32") == 0
    assert [line["step"] for line in metrics(bench.folder / "r") if "loss" in line] == [1, 2, 3, 4]


def test_a_process_cannot_allocate_more_than_its_budget(bench: Bench) -> None:
    assert train(bench, "r", memory={"limit_mib": 700}) == 0
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(500 << 20, dtype=torch.uint8, device="cuda")  # beside 300 MiB of context
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.empty(500 << 20, dtype=torch.uint8, device="cuda")


MOMENTS = {
    "while the model was loaded": "lowvram_chat.training.model_setup.check_causal",
    "in the checks before the first step": "lowvram_chat.training.preflight.run_longest_batch",
    "in the evaluation": "lowvram_chat.training.session.score",
    "in training": "accelerate.optimizer.AcceleratedOptimizer.step",
    "while the model was saved": "lowvram_chat.training.session.save_model",
}
"""What the message says -> the function during which the card is full."""


@pytest.mark.parametrize("said", MOMENTS)
def test_a_full_card_is_advice(
    said: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MOMENTS[said], fill)
    assert train(bench, "r") == 2
    told = capsys.readouterr().err
    assert f"the device ran out of memory {said}" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("kind", ["full fp16", "8-bit", "paged", "lora", "4-bit"])
def test_a_halved_run_keeps_nothing_of_the_session_before(
    kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    original, release = ChatTrainer.compute_loss, run_module.release_memory

    def compute_loss(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        if self.state.global_step == 1 and inputs["input_ids"].size(0) > 2:
            fill()
        return original(self, *args, **kwargs)

    def released(device: torch.device) -> None:
        release(device)
        left.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(run_module, "release_memory", released)
    gc.collect()
    before = torch.cuda.memory_allocated()
    settings = {"train__per_device_train_batch_size": 4, "memory": {"on_oom": "halve"}}
    assert train(bench, "r", **RUNS[kind] | settings) == 0
    assert len(left) == 1
    workspaces = 3 * 8519680  # of cuBLAS: they belong to threads, and stay
    assert left[0] - before <= workspaces
    assert result(bench.folder / "r")["steps"] == 3


def test_every_command_runs_on_the_card(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A generation ends when the card says that it has ended, which it never does on paper.
    steps = iter([True] * 4)
    monkeypatch.setattr(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(steps, False))
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *_, **__: "leftovers")  # which are no tokens
    assert train(bench, "r", **LORA) == 0
    folder = str(bench.folder / "r")
    assert evaluate.main([folder, str(bench.held_out_file), "--device", "cuda"]) == 0
    assert (
        chat.main([folder, "--prompt", "Hello?", "--max-new-tokens", "4", "--temperature", "0", "--device", "cuda"])
        == 0
    )
    assert merge.main([folder]) == 0
    assert doctor.main(["--json"]) in (0, 1)
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    # Its processes would import everything again, and look at values.
    monkeypatch.setattr("lowvram_chat.results.own_run.run_in_new_process", lambda work, *given: work(*given))
    recipe, out = bench.file("b", **COMMON), tmp_path / "bench.json"
    assert bench_command.main(["run", str(recipe), "--steps", "2", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))
