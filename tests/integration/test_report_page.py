"""The report of a run: report.html, and the model's answers before and after, which do not change the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram_chat import sft
from lowvram_chat.training.samples import SampleGenerator
from tests.runs import Bench, curve
from tests.samples import save_tiny_gpt2
from tests.unit.test_pages import Tree

PROMPTS = ["the cat sat on", "where <b>we</b> eat"]


def test_a_run_leaves_a_report_with_its_curves_answers_and_settings(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bench.file("r", output__sample_prompts=PROMPTS, train__eval_steps=4)), "memory.limit_mib=2000"]
    assert sft.main(arguments) == 0
    run = bench.folder / "r"
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    Tree(page)
    for heading in ("Loss", "Learning rate", "Throughput", "Memory", "Answers before and after", "Settings"):
        assert f">{heading}</h2>" in page
    assert "reserved, predicted" in page
    assert "where &lt;b&gt;we&lt;/b&gt; eat" in page
    samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert [sample["prompt"] for sample in samples] == PROMPTS
    assert all(sample["before"] and sample["after"] for sample in samples)
    assert any(sample["before"] != sample["after"] for sample in samples)  # training changes an answer


def test_answers_do_not_change_the_losses(bench: Bench, tmp_path: Path) -> None:
    model = {
        "name": str(save_tiny_gpt2(tmp_path / "dropping", dropout=0.1))
    }  # a changed random state shows in every loss
    with_answers = bench.run("with", model=model, output__sample_prompts=PROMPTS)
    assert curve(with_answers) == curve(bench.run("without", model=model))


def test_a_resumed_run_keeps_the_answers_from_before_training(bench: Bench) -> None:
    settings = {"output__sample_prompts": PROMPTS, "train__save_steps": 4}
    run = bench.run("r", train__max_steps=4, **settings)
    before = [sample["before"] for sample in json.loads((run / "samples.json").read_text(encoding="utf-8"))]
    assert sft.main([str(bench.file("r", train__max_steps=8, **settings)), "--resume"]) == 0
    samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert [sample["before"] for sample in samples] == before


def test_a_model_that_cannot_answer_does_not_end_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("probability tensor contains either inf or nan")

    monkeypatch.setattr(SampleGenerator, "answer", fail)
    assert sft.main([str(bench.file("r", output__sample_prompts=PROMPTS, train__max_steps=2))]) == 0
    assert (bench.folder / "r" / "result.json").is_file()
    assert "no answers after the run (probability tensor" in capsys.readouterr().err
