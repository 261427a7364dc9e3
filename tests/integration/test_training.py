"""Full fine-tuning and every adapter train on a CPU and lower the held-out loss, in 32 and 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs import Bench, curve, metrics, result

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"kind": "lora", "r": 8}},
    "rslora": {"adapter": {"kind": "rslora", "r": 8}},
    "dora": {"adapter": {"kind": "dora", "r": 8}},
    "pissa": {"adapter": {"kind": "pissa", "r": 8}},
    "qlora": {"adapter": {"kind": "lora", "r": 8}, "model__load_in": "4bit"},
    "qdora": {"adapter": {"kind": "dora", "r": 8}, "model__load_in": "4bit"},
}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_lowers_the_held_out_loss(kind: str, optimizer: str, bench: Bench) -> None:
    rate = 5e-3 if kind == "full" else 2e-2
    run = bench.run(kind, optimizer={"name": optimizer}, train__learning_rate=rate, **KINDS[kind])
    said = result(run)
    assert said["held_out_loss_after"] < said["held_out_loss_before"] - 0.1
    assert said["held_out_loss_before"] == pytest.approx(9.0, abs=0.2)  # a random model: ln 8192
    share = said["trained_parameters"] / said["parameters"]
    assert share == 1 if kind == "full" else 0 < share < 0.2


def test_a_4bit_base_with_pissa_is_refused_or_trains(bench: Bench) -> None:
    from lowvram_chat.errors import LowVramError

    try:
        run = bench.run("qpissa", adapter={"kind": "pissa"}, model__load_in="4bit", train__max_steps=3)
    except LowVramError as error:
        assert "pissa" in str(error)
    else:
        assert result(run)["steps"] == 3


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "r": 8}], ids=["full", "lora"])
def test_bf16_trains_beside_fp32(adapter: dict[str, Any] | None, bench: Bench) -> None:
    common = {"adapter": adapter, "train__learning_rate": 2e-3}
    exact = bench.run("fp32", **common)
    rounded = bench.run("bf16", train__precision="bf16", **common)
    assert curve(exact) != curve(rounded)
    gaps = [abs(a - b) for a, b in zip(curve(exact), curve(rounded), strict=True)]
    assert max(gaps) < 0.1
    assert result(rounded)["held_out_loss_after"] < result(rounded)["held_out_loss_before"] - 0.1


def test_a_smaller_frozen_base_keeps_the_adapter_in_float32(bench: Bench) -> None:
    from safetensors.torch import load_file

    run = bench.run("half", model__dtype="bfloat16", adapter={"kind": "lora"}, train__precision="bf16")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert result(run)["held_out_loss_after"] < result(run)["held_out_loss_before"]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "constant"])
def test_the_learning_rate_follows_its_schedule(name: str, bench: Bench) -> None:
    run = bench.run("r", train__lr_scheduler_type=name, train__warmup_ratio=0.25, train__learning_rate=1e-3)
    rates = [line["learning_rate"] for line in metrics(run) if "loss" in line]
    assert len(rates) == 12
    assert max(rates) == pytest.approx(1e-3)
    if name == "constant":
        assert set(rates) == {1e-3}
    else:
        assert rates[:3] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3])  # a quarter of 12 steps
        assert rates[3] == pytest.approx(1e-3)
    if name in ("cosine", "linear"):
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert rates[-1] < 2e-4
    if name == "constant_with_warmup":
        assert set(rates[3:]) == {1e-3}


def test_clipping_holds_the_step_and_zero_switches_it_off(bench: Bench) -> None:
    common: dict[str, Any] = {"optimizer": {"name": "sgd"}, "train__learning_rate": 0.5, "train__max_steps": 4}
    held = bench.run("held", train__max_grad_norm=0.01, **common)
    free = bench.run("free", train__max_grad_norm=0, **common)
    assert curve(held)[0] == curve(free)[0]
    assert curve(held)[0] - curve(held)[-1] < 0.5 * (curve(free)[0] - curve(free)[-1])
    assert all(line["grad_norm"] > 0 for line in metrics(held) if "loss" in line)


def test_the_seed_decides_the_run(bench: Bench) -> None:
    one = bench.run("one", model__dropout=0.1, train__max_steps=5)
    same = bench.run("same", model__dropout=0.1, train__max_steps=5)
    other = bench.run("other", model__dropout=0.1, train__max_steps=5, train__seed=7)
    assert curve(one) == curve(same) != curve(other)


def test_dropout_changes_the_training_and_not_the_evaluation(bench: Bench) -> None:
    from lowvram_chat.api import evaluate

    without = bench.run("without", train__max_steps=2)
    dropped = bench.run("with", model__dropout=0.5, train__max_steps=2, train__eval_steps=2)
    assert curve(without)[0] != curve(dropped)[0]
    assert result(without)["held_out_loss_before"] == result(dropped)["held_out_loss_before"]
    after = result(dropped)["held_out_loss_after"]
    assert evaluate(str(dropped), [])["assistant"].loss == pytest.approx(after, abs=1e-5)
    assert [line["eval_loss"] for line in metrics(dropped) if "eval_loss" in line] == [pytest.approx(after, abs=1e-5)]


def test_evaluation_during_the_run_agrees_with_the_one_after_it(bench: Bench) -> None:
    run = bench.run("r", train__eval_steps=4)
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    assert set(losses) == {4, 8, 12}
    assert losses[12] == pytest.approx(result(run)["held_out_loss_after"], abs=1e-6)
    assert losses[12] < losses[4]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_held_out_loss_does_not_depend_on_the_evaluation_batch(size: int, bench: Bench) -> None:
    run = bench.run("r", train__max_steps=1, train__per_device_eval_batch_size=size)
    whole = bench.run("whole", train__max_steps=1)
    assert result(run)["held_out_loss_after"] == pytest.approx(result(whole)["held_out_loss_after"], abs=1e-6)


def test_a_run_by_epochs_sees_every_row_once_an_epoch(bench: Bench) -> None:
    run = bench.run("r", train__max_steps=None, train__num_train_epochs=2, train__per_device_train_batch_size=16)
    said = result(run)
    assert said["steps"] == 8
    assert said["epochs"] == 2
    assert said["real_tokens"] == 2 * said["data"]["tokens"]
    assert said["padded_tokens"] > said["real_tokens"]
