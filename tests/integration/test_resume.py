"""A resumed run is the run that was never interrupted."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_chat import api, sft
from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.trainer import ChatTrainer
from tests.runs import Bench, curve, metrics, result

RATES = {"real_tokens_per_second", "padded_tokens_per_second", "seconds", "peak_resident_bytes"}
MEASURED = {"seconds", "peak_resident_bytes", "adapter", "model"}

# Dropout, accumulation, unequal lengths and a data order that is drawn anew in the second epoch: all must be restored.
SETTINGS: dict[str, Any] = {
    "model__dropout": 0.1,
    "train__max_steps": 12,
    "train__per_device_train_batch_size": 4,
    "train__gradient_accumulation_steps": 2,
    "train__save_steps": 5,
    "train__eval_steps": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full 8bit": {"optimizer": {"name": "adamw_8bit"}},
    "lora": {"adapter": {"kind": "lora", "dropout": 0.1}, "train__learning_rate": 2e-2},
    "pissa": {"adapter": {"kind": "pissa"}},
    "grouped": {"data__rows": "grouped"},
    "packed": {"data__rows": "packed"},
}


def interrupt(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    """Let Ctrl-C come in the given micro-batch."""
    original, count = ChatTrainer.compute_loss, iter(range(1, 10**6))

    def compute_loss(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(count) == micro_batch:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)


def without(lines: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    [file] = [*run.glob("model/model.safetensors"), *run.glob("adapter/adapter_model.safetensors")]
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | KINDS[kind]
    whole = bench.run("whole", **settings)
    recipe = bench.recipe("broken", **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, micro_batch=2 * 7 + 2)  # in the eighth step: the checkpoint of step 5 is the last
        with pytest.raises(KeyboardInterrupt):
            api.train(recipe)
    broken = Path(recipe.output.dir)
    assert not (broken / "result.json").exists()
    api.train(recipe, resume=True)

    assert without(metrics(broken), RATES) == without(metrics(whole), RATES)  # no step twice, none missing
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name]), name
    assert without([result(broken)], MEASURED) == without([result(whole)], MEASURED)


def test_ctrl_c_ends_with_130_and_without_a_traceback(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, micro_batch=3)
    assert sft.main([str(bench.file("r"))]) == 130
    assert "Traceback" not in capsys.readouterr().err


def copy(run: Path, bench: Bench) -> Path:
    """Return a copy of a finished run whose recipe can be resumed."""
    target = bench.folder / "copy"
    shutil.copytree(run, target)
    return target


@pytest.mark.parametrize("lacking", ["trainer_state.json", "token_counts.json"])
def test_a_half_written_checkpoint_is_passed_over(full_run: Path, bench: Bench, lacking: str) -> None:
    run = copy(full_run, bench)
    newest = RunDir(run).last_checkpoint()
    assert newest is not None
    (newest / lacking).unlink()
    (run / "result.json").unlink()
    recipe = bench.recipe("copy", train__save_steps=5, train__eval_steps=5)
    api.train(recipe, resume=True)
    assert without(metrics(run), RATES) == without(metrics(full_run), RATES)
    assert without([result(run)], MEASURED) == without([result(full_run)], MEASURED)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"global_step": null}'])
def test_a_checkpoint_with_a_broken_state_is_no_checkpoint(content: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(content, encoding="utf-8")
    assert RunDir(tmp_path).last_checkpoint() is None


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("trainer_state.json", "token_counts.json"):  # as an earlier version wrote it, without a manifest
            (folder / name).write_text(f'{{"global_step": {step}}}', encoding="utf-8")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    newest = RunDir(tmp_path).last_checkpoint()
    assert newest is not None
    assert newest.name == "checkpoint-100"


def test_resume_without_a_checkpoint_is_refused(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="no whole checkpoint"):
        api.train(bench.recipe("r"), resume=True)
    assert not (bench.folder / "r").exists()


def test_a_finished_run_can_be_resumed_to_more_steps(bench: Bench) -> None:
    run = bench.run(
        "r", train__max_steps=4, train__save_steps=4, train__lr_scheduler_type="constant", train__warmup_ratio=0.0
    )
    longer = bench.recipe(
        "r", train__max_steps=8, train__save_steps=4, train__lr_scheduler_type="constant", train__warmup_ratio=0.0
    )
    before = result(run)["held_out_loss_before"]
    api.train(longer, resume=True)
    assert result(run)["steps"] == 8
    assert result(run)["held_out_loss_before"] == pytest.approx(before, abs=1e-6)
    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    whole = bench.run("whole", train__max_steps=8, train__lr_scheduler_type="constant", train__warmup_ratio=0.0)
    assert curve(run) == curve(whole)


def test_resuming_a_run_that_has_ended_changes_nothing(bench: Bench) -> None:
    run = bench.run("r", train__max_steps=4, train__save_steps=4)
    lines, said = metrics(run), result(run)
    api.train(bench.recipe("r", train__max_steps=4, train__save_steps=4), resume=True)
    assert metrics(run) == lines
    assert without([result(run)], MEASURED) == without([said], MEASURED)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"adapter": {"kind": "lora", "r": 4}}, "adapter.r=4 (was 16)"),
    ({"adapter": {"kind": "lora", "alpha": 8}}, "adapter.alpha=8 (was 32)"),
    ({"adapter": None}, "adapter=null (was lora)"),
    ({"model__name": "builtin:tiny-gpt2"}, "model.name=builtin:tiny-gpt2 (was "),
    ({"model__dtype": "bfloat16"}, "model.dtype=bfloat16 (was float32)"),
    ({"optimizer": {"name": "sgd"}}, "optimizer.name=sgd (was adamw)"),
    ({"train__learning_rate": 1e-3}, "train.learning_rate=0.001 (was 0.005)"),
    ({"data__max_length": 32}, "data.max_length=32 (was 64)"),
    ({"train__gradient_accumulation_steps": 3}, "train.gradient_accumulation_steps=12 (was 4)"),
    ({"train__max_steps": 2}, "train.max_steps: 2, but the last checkpoint"),
]


def test_what_the_checkpoint_is_no_state_of_is_refused_with_nothing_written(bench: Bench) -> None:
    lora = {"adapter": {"kind": "lora"}, "train__max_steps": 3, "train__save_steps": 3}
    run = bench.run("r", **lora)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for change, said in CHANGES:
        with pytest.raises(UsageError) as error:
            api.train(bench.recipe("r", **(lora | change)), resume=True)
        assert said in str(error.value)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_settings_that_may_change_are_told_and_trained_with(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {"adapter": {"kind": "lora"}, "train__save_steps": 3}
    api.train(bench.recipe("r", **lora, train__max_steps=3))
    file = bench.file("r", **(lora | {"adapter": {"kind": "lora", "fused": False}}), train__max_steps=5)
    capsys.readouterr()
    assert (
        sft.main([str(file), "--resume", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"])
        == 0
    )
    said = capsys.readouterr().err
    assert "resuming with adapter.fused = false (was true)" in said
    assert "resuming with train.max_steps = 5 (was 3)" in said
    assert "resuming with train.per_device_train_batch_size = 2 (was 4)" in said
    assert result(bench.folder / "r")["steps"] == 5


def test_a_run_whose_last_checkpoint_is_of_its_last_step_trains_no_further(bench: Bench) -> None:
    run = bench.run("r", train__max_steps=4, train__save_steps=4)
    lines, trained = metrics(run), weights(run)
    api.train(bench.recipe("r", train__max_steps=4, train__save_steps=2), resume=True)
    assert metrics(run) == lines
    assert result(run)["steps"] == 4
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, trained[name]), name


def test_a_run_that_has_ended_says_so(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = str(bench.file("r", train__max_steps=4, train__save_steps=4))
    assert sft.main([file]) == 0
    capsys.readouterr()
    caplog.set_level(logging.INFO, "lowvram_chat")
    monkeypatch.setattr(logging.getLogger("lowvram_chat"), "propagate", True)
    assert sft.main([file, "--resume"]) == 0
    assert "this run ended after 4 steps, so there is nothing to resume" in caplog.text
    assert "4 steps, " in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_to_be_overwritten(bench: Bench) -> None:
    recipe = bench.recipe("r", train__max_steps=1)
    api.train(recipe)
    with pytest.raises(UsageError, match=r"--overwrite to replace it, or set output\.dir"):
        api.train(recipe)
    with pytest.raises(NotFoundError, match="Start the run with --overwrite"):
        api.train(recipe, resume=True)


def test_a_resumed_run_takes_its_intervals_from_the_recipe(bench: Bench) -> None:
    bench.run("r", train__save_steps=4, train__max_steps=4)
    new = {"train__save_steps": 3, "train__logging_steps": 4, "train__eval_steps": 2, "train__max_steps": 8}
    api.train(bench.recipe("r", train__save_total_limit=9, **new), resume=True)
    run = bench.folder / "r"
    assert sorted(path.name for path in run.glob("checkpoints/*")) == [f"checkpoint-{step}" for step in (4, 6, 8)]
    lines = [line for line in metrics(run) if line["step"] > 4]
    assert [line["step"] for line in lines if "loss" in line] == [8]
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 8]


def test_fewer_epochs_than_are_done_are_refused(bench: Bench) -> None:
    bench.run("r", train__max_steps=None, train__num_train_epochs=1, train__save_steps=8)
    with pytest.raises(
        UsageError, match=r"train\.num_train_epochs: 0\.5 are 8 steps, but the last checkpoint is from step 16"
    ):
        api.train(
            bench.recipe("r", train__max_steps=None, train__num_train_epochs=0.5, train__save_steps=8), resume=True
        )
