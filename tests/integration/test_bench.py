"""The benchmarks: a recipe is measured, a slower step is detected, and an interrupted suite keeps its finished cases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowvram_chat import bench as command
from lowvram_chat.gpus import known_gpu
from lowvram_chat.results import measure
from lowvram_chat.results.own_run import summary_sentence
from lowvram_chat.results.record import Machine, Metric, Record, load, store
from tests.runs import Bench
from tests.samples import ROOT
from tests.unit.test_results import git

IN_CHILDREN = {"step_clock", "trl_clock", "turn_clock"}
"""Modules of the suite that are only imported in child processes."""


def test_a_recipe_is_measured_on_this_machine(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    out = bench.folder / "mine.json"
    assert command.main(["run", str(bench.file("r")), "--steps", "4", "--out", str(out), "train.seed=3"]) == 0
    record = load(out)
    assert record.status == "passed"
    assert record.metrics["tokens_per_second"].samples == 4
    assert record.metrics["tokens_per_second"].value > 0
    assert {metric.kind for metric in record.metrics.values()} == {"measured"}  # the planner predicts nothing for a CPU
    output = capsys.readouterr().out
    assert "x the baseline's 3,666" in output
    assert str(out) in output
    assert command.main(["report", str(out)]) == 0
    assert command.main(["run", str(bench.file("r")), "--steps", "0"]) == 2
    with pytest.raises(SystemExit):
        command.main(["run", str(bench.file("r")), "--stepz", "4"])
    assert command.main(["run", str(bench.file("r")), "--out", str(bench.folder / "no" / "x.json")]) == 2


def test_a_slowed_step_fails_the_comparison(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lowvram_chat.results import own_run
    from lowvram_chat.results.machine import this_machine
    from lowvram_chat.training.trainer import ChatTrainer

    recipe = bench.recipe("r")

    def measured_record() -> Record:
        speed = own_run.speed_metrics(measure.measure_steps(recipe, 6, "speed"))
        return Record(benchmark="run", case="r", metrics=speed, machine=this_machine())

    store(measured_record(), tmp_path / "old")
    step: Callable[..., torch.Tensor] = ChatTrainer.training_step

    def slowed(*args: object, **kwargs: object) -> torch.Tensor:
        time.sleep(0.2)
        return step(*args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "training_step", slowed)
    store(measured_record(), tmp_path / "slow")
    assert command.main(["compare", str(tmp_path / "old"), str(tmp_path / "slow")]) == 1


def test_running_out_of_memory_is_a_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_chat.training.session import Session

    def run_out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Session, "prepare", run_out_of_memory)
    measurement = measure.measure_steps(bench.recipe("r"), 2, "memory")
    assert measurement == {"status": "out_of_memory", "reason": "CUDA out of memory. Tried to allocate 2.00 GiB."}


@pytest.mark.parametrize("settings", [{}, {"data__rows": "packed"}, {"train__gradient_accumulation_steps": 2}])
def test_the_steps_that_are_measured_are_full_rows(bench: Bench, settings: dict[str, object]) -> None:
    recipe = bench.recipe("r", **settings)
    measurement = measure.measure_steps(recipe, 2, "speed")
    assert len(measurement["seconds"]) == 2
    assert measurement["tokens_per_step"] == 4 * 64 * recipe.train.gradient_accumulation_steps
    rows = measure.random_rows(recipe, 2).train
    assert len(rows) == 4 * recipe.train.gradient_accumulation_steps * (2 + measure.WARM_UP_STEPS)
    assert {len(row["input_ids"]) for row in rows} == {64}


def test_a_model_that_cannot_be_loaded_is_measured_with_random_weights_of_its_shapes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram_chat.model import configs

    small = {**configs.GPT2, "n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 9000}
    monkeypatch.setattr(configs, "KNOWN_CONFIGS", {"openai-community/gpt2": small})
    # The tokenizer that stands in for the model's lacks the tokens of this template.
    recipe = bench.recipe("r", model={"name": "openai-community/gpt2"}, data__chat_template="chatml")
    assert measure.measure_steps(recipe, 1, "memory")["peak_resident_bytes"] > 0


def test_the_summary_compares_with_the_baseline_and_the_prediction() -> None:
    card = Machine(name="c", platform="", processor="", threads=1, card="RTX 3050")
    figures = {"tokens_per_second": (8797.0, "measured"), "predicted_tokens_per_second": (9132.0, "predicted")}
    figures |= {"reserved": (2900.0, "measured"), "predicted_reserved": (2914.0, "predicted")}
    metrics = {name: Metric(value=value, unit="", kind=kind) for name, (value, kind) in figures.items()}  # type: ignore[arg-type]
    assert summary_sentence(Record(benchmark="run", case="fast_fp16", metrics=metrics, machine=card)) == (
        "fast_fp16: measured 8,797 tokens/s, 2.4x the baseline's 3,666, predicted 9,132 tokens/s (+3.8%); "
        "peak reserved 2,900 MiB measured, predicted 2,914 MiB (+0.5%)"
    )
    full = Record(benchmark="run", case="r", status="out_of_memory", reason="full", machine=card)
    assert summary_sentence(full) == "r: out of memory (full)"


@pytest.mark.parametrize(
    ("card", "mib", "row"),
    [
        ("NVIDIA GeForce RTX 3050 Laptop GPU", 4096, "rtx-3050-laptop-4gb"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", 4096 - 100, "rtx-3050-laptop-4gb"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", 6144, "rtx-3050-laptop-6gb"),
        ("NVIDIA GeForce RTX 3050 Ti Laptop GPU", 4096, None),
        ("NVIDIA GeForce RTX 3050", 6144, "rtx-3050-6gb"),
        ("NVIDIA GeForce RTX 3050", 8192, "rtx-3050-8gb"),
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144, "rtx-3060-laptop-6gb"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "rtx-4060-laptop-8gb"),
        ("NVIDIA GeForce RTX 4060", 8188, "rtx-4060-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, None),
        ("NVIDIA GeForce GTX 1060 with Max-Q Design", 6144, "gtx-1060-6gb"),
        ("NVIDIA GeForce MX450", 2048, "mx450-laptop-2gb"),
        ("Tesla P100-PCIE-16GB", 16384, "p100-16gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA GeForce RTX 2050", 4096, "rtx-2050-laptop-4gb"),
        ("NVIDIA GeForce RTX 3090", 24576, "rtx-3090-24gb"),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, None),
        ("NVIDIA GeForce GTX 1650", 3911, "gtx-1650-4gb"),
        ("Tesla T4", 15360, "t4-16gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
    ],
)
def test_the_name_that_a_driver_reports_finds_its_row_of_the_card_table(card: str, mib: int, row: str | None) -> None:
    assert known_gpu(card, mib) == row


def suite(folder: Path) -> Path:
    """Return a git checkout with a suite of two cases, the second of which runs for a minute."""
    (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (folder / "test_two.py").write_text(
        textwrap.dedent(
            """
            import time

            def test_one(keeper):
                keeper.keep("some", "first", {})

            def test_two(keeper):
                print("waiting", flush=True)
                time.sleep(60)
            """
        )
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "suite")
    return folder


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes inherit a handler that ignores it


@pytest.mark.skipif(
    sys.platform == "win32",
    reason="Windows cannot send Ctrl-C to one process; another test checks that a case is stored at once",
)
def test_an_interrupted_suite_keeps_the_finished_cases(tmp_path: Path) -> None:
    folder = suite(tmp_path)
    command_line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "--store",
        "--results",
        str(folder / "results"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command_line, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(signal.SIGINT)
    process.wait(30)
    (kept,) = (folder / "results").rglob("*.json")
    assert json.loads(kept.read_text())["case"] == "first"
    (folder / "test_two.py").write_text("def test_one(keeper):\n    pass\n")
    refused = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "the tree is dirty (test_two.py)" in refused.stderr
    assert command.main(["report", str(folder / "results")]) == 0


def test_the_suite_s_own_process_imports_no_library_that_uses_the_card() -> None:
    # bitsandbytes queries the card when it is imported, and a process that has done so may hold memory on it.
    modules = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in IN_CHILDREN]
    code = f"import sys, {', '.join(modules)}; print({{'bitsandbytes', 'peft', 'trl'}} & {{*sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_steps_that_take_turns_are_counted_after_the_warm_up(tmp_path: Path) -> None:
    from benchmarks import bench_turns
    from benchmarks.timed_runs import WARM_UP

    lines = [{"step": step, "real_tokens": 100 * step} for step in range(1, 6)] + [{"held_out_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    seconds = [9.0, 9.0, 1.0, 2.0, 3.0]
    assert bench_turns._counted(tmp_path, seconds) == [(100, second) for second in seconds[WARM_UP:]]


def test_a_run_that_ends_before_its_turn_says_why() -> None:
    from benchmarks import bench_turns

    code = f"print('loading'); print('{bench_turns.STEP}1.5'); print('no such setting')"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert bench_turns._seconds(child) == 1.5
    with pytest.raises(RuntimeError, match="no such setting"):
        bench_turns._seconds(child)
    child.communicate()
