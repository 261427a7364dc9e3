"""A run is planned first: what cannot fit is refused with nothing written, unless it is forced."""

from __future__ import annotations

import json

import pytest

from lowvram_chat import sft
from lowvram_chat.training.resume import is_same
from lowvram_chat.training.run_dir import RunDir
from tests.runs import Bench, curve


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.main([str(bench.file("r", memory={"limit_mib": 301}))]) == 1
    told = capsys.readouterr().err
    assert "DOES NOT FIT" in told
    assert "--force" in told
    assert "Traceback" not in told
    assert not (bench.folder / "r").exists()


def test_a_forced_run_writes_the_prediction_into_its_result(bench: Bench) -> None:
    words = [str(bench.file("r", memory={"limit_mib": 301}, train__max_steps=1)), "--force"]
    assert sft.main(words) == 0
    planned = json.loads((bench.folder / "r" / "result.json").read_text(encoding="utf-8"))["memory_plan"]
    assert planned["predicted_reserved_bytes"] >= planned["predicted_allocated_bytes"] > 0
    assert planned["error_percent"] is None  # nothing is measured without a card


def test_a_run_on_a_cpu_without_a_memory_section_is_not_planned(bench: Bench) -> None:
    assert sft.main([str(bench.file("r", train__max_steps=1))]) == 0
    assert "memory_plan" not in json.loads((bench.folder / "r" / "result.json").read_text(encoding="utf-8"))


def test_a_planned_micro_batch_is_the_largest_that_fits_and_the_step_stays_the_same_rows(bench: Bench) -> None:
    given = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4, "train__max_steps": 3}
    roomy = bench.run("roomy", train__micro_batch="planned", **given)
    train = RunDir(roomy).recipe().train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (8, 1)
    assert (train.micro_batch, train.gradient_checkpointing) == ("given", False)
    assert curve(roomy) == pytest.approx(curve(bench.run("as-given", **given)), rel=1e-4)
    assert sft.main([str(bench.file("roomy", train__micro_batch="planned", **given)), "--resume"]) == 2  # no checkpoint
    before, asked = RunDir(roomy).recipe(), bench.recipe("roomy", train__micro_batch="planned", **given)
    assert is_same(before, asked)
    more = asked.train.model_copy(update={"gradient_accumulation_steps": 8})
    assert not is_same(before, asked.model_copy(update={"train": more}))  # another effective batch
