"""A run proves itself before its first step: gradients, saving, disk space; and a refused run leaves everything as it was."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lowvram_chat import api, sft
from lowvram_chat.errors import ModelError, SubstitutionError, UsageError
from lowvram_chat.model import fused_lora, loss
from lowvram_chat.model.logits import LogitTransform
from lowvram_chat.training import gradient_check, preflight
from lowvram_chat.training.session import Session
from lowvram_chat.training.trainer import ChatTrainer
from tests.runs import Bench, result
from tests.samples import write_jsonl

LORA = {"kind": "lora", "r": 4}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, bf16": {"train__precision": "bf16"},
    "accumulated": {"train__gradient_accumulation_steps": 4, "train__per_device_train_batch_size": 1},
    "packed": {"data__rows": "packed"},
    "checkpointed": {"train__gradient_checkpointing": True},
    "dropout": {"model__dropout": 0.3},
    "lora": {"adapter": LORA},
    "lora, bf16": {"adapter": LORA, "train__precision": "bf16"},
    "lora with dropout": {"adapter": LORA | {"dropout": 0.5}},
    "dora": {"adapter": LORA | {"kind": "dora"}},
    "qlora": {"adapter": LORA, "model__load_in": "4bit"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_passes_and_says_so(kind: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.main([str(bench.file("r", train__max_steps=1, **KINDS[kind]))]) == 0
    assert "checked: weights, loss, gradients, saving, rows of 64 tokens" in capsys.readouterr().err
    assert not (bench.folder / "r" / "rehearsal").exists()


def test_the_checks_change_nothing_of_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_checks = bench.run("with", adapter=LORA, model__dropout=0.1, train__max_steps=4)
    monkeypatch.setattr(preflight, "check_gradients", lambda _: None)
    without = bench.run("without", adapter=LORA, model__dropout=0.1, train__max_steps=4)
    names = ("held_out_loss_after", "training_loss", "real_tokens", "padded_tokens")
    assert [result(with_checks)[name] for name in names] == [result(without)[name] for name in names]


def test_the_checked_step_runs_in_the_run_s_precision(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ChatTrainer.compute_loss
    types: list[torch.dtype | None] = []
    in_backward: list[bool] = []

    def recorded(self: ChatTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        types.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        loss: torch.Tensor = original(self, *args, **kwargs)
        if loss.requires_grad:
            loss.register_hook(lambda _: in_backward.append(torch.is_autocast_enabled("cpu")))
        return loss

    monkeypatch.setattr(ChatTrainer, "compute_loss", recorded)
    monkeypatch.setattr(ChatTrainer, "train", lambda *_, **__: None)
    api.train(bench.recipe("r", train__precision="bf16"))
    assert types == [torch.bfloat16] * 3  # once for the loss, and two micro-batches for the gradients
    assert in_backward == [False] * 2


def twice(self: ChatTrainer, *args: Any, original: Any = ChatTrainer.compute_loss, **kwargs: Any) -> torch.Tensor:
    """Return the right loss, with twice its gradient."""
    right: torch.Tensor = original(self, *args, **kwargs)
    return 2 * right - right.detach()


def test_a_gradient_of_another_size_is_refused_and_nothing_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ChatTrainer, "compute_loss", twice)
    assert sft.main([str(bench.file("r"))]) == 2
    assert "the gradient of the head in a training step differs" in capsys.readouterr().err
    assert not (bench.folder / "r").exists()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_gradient_scaler_is_taken_out_of_the_comparison(
    scale: float, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Session._trainer

    def with_scaler(self: Session, *args: Any) -> ChatTrainer:
        trainer = build(self, *args)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    monkeypatch.setattr(Session, "_trainer", with_scaler)
    monkeypatch.setattr(ChatTrainer, "train", lambda *_, **__: None)
    api.train(bench.recipe("r"))
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 2 * scale)
    with pytest.raises(SubstitutionError, match="the gradient of the head"):
        api.train(bench.recipe("wrong"))


def test_a_wrong_fused_loss_is_replaced_by_the_models_own_and_the_run_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bench.run("unfused", model__fused_loss=False, train__max_steps=3)
    monkeypatch.setattr(loss, "logit_transform", lambda _: LogitTransform(scale=0.5))
    run = bench.run("r", train__max_steps=3)
    assert result(run)["training_loss"] == result(expected)["training_loss"]
    assert "the trainer computes a loss of" in caplog.text
    assert "continuing with the model's own loss, more memory and more time" in caplog.text


def test_a_wrong_fused_adapter_is_replaced_by_pefts_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bench.run("unfused", adapter=LORA | {"fused": False}, model__fused_loss=False, train__max_steps=3)
    original = fused_lora._FoldedProduct.backward

    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x, *others, d_a, d_b, last = original(ctx, *upstream)
        return (d_x, *others, d_a, None if d_b is None else d_b * 1.5, last)

    monkeypatch.setattr(fused_lora._FoldedProduct, "backward", staticmethod(backward))
    run = bench.run("r", adapter=LORA, train__max_steps=3)
    assert result(run)["training_loss"] == result(expected)["training_loss"]
    assert "block in a training step differs from that of plain autograd" in caplog.text


def test_a_refused_overwrite_leaves_the_earlier_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.run("r", train__max_steps=2, train__save_steps=1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(ChatTrainer, "compute_loss", twice)
    assert sft.main([str(bench.file("r")), "--overwrite"]) == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert not list(bench.folder.glob(".r.lowvram-chat-earlier"))


def test_a_base_whose_generation_config_contradicts_itself_can_be_trained_and_saved(
    bench: Bench, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bench.folder / "model"
    shutil.copytree(tiny, folder)
    config = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 5, 999_999]}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    caplog.set_level("INFO")
    run = bench.run("r", model__name=str(folder), train__max_steps=2, train__save_steps=1)
    assert "its generation config does not use temperature, top_p" in caplog.text
    saved = GenerationConfig.from_pretrained(run / "model")
    assert saved.eos_token_id == [0, 3, 5]
    AutoModelForCausalLM.from_pretrained(run / "model").generation_config.validate(strict=True)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_anything_is_written(
    bench: Bench, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: GenerationConfig, *args: object, **kwargs: object) -> None:
        raise ValueError("GenerationConfig is invalid")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", fail)
    with pytest.raises(ModelError, match="a model trained from it could not be saved"):
        api.train(bench.recipe("r"))
    assert not (bench.folder / "r").exists()


def test_a_disk_with_too_little_space_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 65 << 20))
    with pytest.raises(UsageError, match=r"need about 6[67] MiB, and 65 MiB are free"):
        api.train(bench.recipe("r"))
    assert not (bench.folder / "r").exists()


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_estimated_space_is_that_of_the_run(adapter: dict[str, Any] | None, bench: Bench) -> None:
    settings: dict[str, Any] = {"adapter": adapter, "train__save_steps": 1, "train__save_total_limit": 2}
    run = bench.run("r", train__max_steps=4, **settings)
    weights = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    states = sum(path.stat().st_size for path in run.rglob("optimizer.pt"))
    [one] = {path.stat().st_size for path in run.glob("checkpoints/*/optimizer.pt")}
    trained = result(run)["trained_parameters"]
    estimate = trained * (4 + 3 * (4 + 8))
    assert weights + states + one + 4 * trained == pytest.approx(estimate, rel=0.2)


def test_a_tolerance_is_far_from_what_a_right_gradient_needs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "FP32_TOLERANCE", gradient_check.FP32_TOLERANCE / 50)
    monkeypatch.setattr(gradient_check, "HALF_TOLERANCE", gradient_check.HALF_TOLERANCE / 3)
    for kind in ("full", "full, bf16", "lora", "lora, bf16", "packed"):
        bench.run(kind.replace(", ", "-"), train__max_steps=1, **KINDS[kind])


def test_a_nan_is_no_small_difference(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "_relative_difference", lambda *_: float("nan"))
    with pytest.raises(SubstitutionError):
        api.train(bench.recipe("r", model__fused_loss=False))


def test_rounding_of_a_model_that_knows_its_rows_by_heart_is_no_wrong_gradient(bench: Bench) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    rows = write_jsonl(bench.folder / "rows.jsonl", [row] * 10)
    data = {"source": str(rows), "max_length": 64}
    learned = bench.run("learned", data=data, train__max_steps=120)
    bench.run("again", model__name=str(learned / "model"), data=data, train__max_steps=2, train__precision="bf16")


def test_a_run_that_holds_its_own_base_or_data_is_not_replaced(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.run("r", train__max_steps=1)
    before = sorted(run.rglob("*"))
    (run / "rows.jsonl").write_text(bench.train_file.read_text(encoding="utf-8"), encoding="utf-8")
    for setting in (f"model.name={run / 'model'}", f"data.source={run / 'rows.jsonl'}"):
        assert sft.main([str(bench.file("r")), setting, "--overwrite"]) == 2
        assert "so it is not replaced" in capsys.readouterr().err
    (run / "rows.jsonl").unlink()
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_base_that_disappears_during_the_run_loses_nothing(
    adapter: dict[str, Any] | None, bench: Bench, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bench.folder / "base"
    shutil.copytree(tiny, base)
    train = ChatTrainer.train

    def without_base(self: ChatTrainer, *args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(base)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "train", without_base)
    run = bench.run("r", model__name=str(base), adapter=adapter, train__max_steps=2)
    assert list(run.glob("*/*.safetensors"))


def test_a_linked_run_folder_stays_a_link(bench: Bench) -> None:
    disk = bench.folder / "other disk"
    disk.mkdir()
    link = bench.folder / "r"
    link.symlink_to(disk)
    bench.run("r", train__max_steps=1)
    assert link.is_symlink()
    api.train(bench.recipe("r", train__max_steps=2), overwrite=True)
    assert link.is_symlink()
    assert result(disk)["steps"] == 2
    assert not list(bench.folder.glob(".*.lowvram-chat-earlier"))


def test_a_rehearsal_that_was_killed_does_not_stop_a_resumed_run(bench: Bench) -> None:
    run = bench.run("r", train__max_steps=2, train__save_steps=2)
    (run / "rehearsal").mkdir()
    (run / "rehearsal" / "config.json").write_text("{", encoding="utf-8")
    api.train(bench.recipe("r", train__max_steps=3, train__save_steps=2), resume=True)
    assert result(run)["steps"] == 3
    assert not (run / "rehearsal").exists()


def test_a_file_that_appears_during_the_checks_is_not_deleted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.folder / "r"

    def write_and_fail(_: object) -> None:
        (folder / "mine.txt").write_text("mine", encoding="utf-8")
        raise UsageError("no")

    monkeypatch.setattr(preflight, "check_gradients", write_and_fail)
    with pytest.raises(UsageError, match=r"^no$"):
        api.train(bench.recipe("r"))
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_an_earlier_run_that_cannot_be_put_back_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bench.run("r", train__max_steps=1)

    def write_and_fail(_: object) -> None:
        (folder / "mine.txt").write_text("mine", encoding="utf-8")
        raise UsageError("no")

    monkeypatch.setattr(preflight, "check_gradients", write_and_fail)
    with pytest.raises(UsageError, match=r"^no$"):
        api.train(bench.recipe("r"), overwrite=True)
    [earlier] = bench.folder.glob(".r.lowvram-chat-earlier")
    assert f"The earlier run is in {earlier}" in caplog.text
    assert (earlier / "result.json").is_file()


def test_a_run_that_holds_data_under_a_pattern_is_not_replaced(bench: Bench) -> None:
    run = bench.run("r", train__max_steps=1)
    shutil.copy(bench.train_file, run / "rows.jsonl")
    with pytest.raises(UsageError, match="so it is not replaced"):
        api.train(bench.recipe("r", data__source=str(run / "*.jsonl")), overwrite=True)
    assert (run / "rows.jsonl").is_file()


def test_the_longest_batch_is_tried_with_gradient_checkpointing_where_the_run_has_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[bool, bool]] = []
    original = preflight.try_longest_batch

    def look(trainer: ChatTrainer) -> int:
        block = next(module for module in trainer.trained_model.modules() if hasattr(module, "gradient_checkpointing"))
        found.append((trainer.args.gradient_checkpointing, bool(block.gradient_checkpointing)))
        return original(trainer)

    monkeypatch.setattr(preflight, "try_longest_batch", look)
    for checkpointing in (True, False):
        bench.run(f"checkpointing_{checkpointing}", train__gradient_checkpointing=checkpointing, train__max_steps=1)
    assert found == [(True, True), (False, False)]
