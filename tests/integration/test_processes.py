"""Commands in processes of their own: exit codes end to end, and two processes that train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Bench, curve, differences, metrics, result
from tests.samples import ROOT


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m words` in a folder, offline, on one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
        timeout=120,
    )


def test_a_run_in_a_process_of_its_own_says_little_and_ends_with_0(bench: Bench) -> None:
    done = command(["lowvram_chat.sft", str(bench.file("r", train__max_steps=2))], bench.folder)
    assert done.returncode == 0, done.stderr
    assert "held-out loss: " in done.stdout
    for noise in ("Warning", "warnings.warn", "[transformers]", "Traceback", "bitsandbytes", "it/s]"):
        assert noise not in done.stderr + done.stdout
    assert result(bench.folder / "r")["steps"] == 2


def test_a_mistake_in_a_process_of_its_own_ends_with_2(bench: Bench) -> None:
    done = command(["lowvram_chat", "sft", str(bench.file("r")), "model.name=nosuch-owner/nosuch-model"], bench.folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("nosuch-owner/nosuch-model: ")


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "r": 8}], ids=["full", "lora"])
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(adapter: dict[str, Any] | None, bench: Bench) -> None:
    common: dict[str, Any] = {
        "adapter": adapter,
        "train__max_steps": 3,
        "train__warmup_ratio": 0.0,
        "train__save_steps": 2,
    }
    one = bench.run("one", train__per_device_train_batch_size=4, **common)
    if adapter is not None:
        bench.run("two", train__per_device_train_batch_size=2, **common)  # in the way: both processes must get past it
    recipe = bench.file("two", train__per_device_train_batch_size=2, **common)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lowvram_chat.sft", str(recipe)]
    done = command([*launch, "--overwrite"], bench.folder)
    assert done.returncode == 0, done.stderr[-3000:]
    two = bench.folder / "two"
    assert [line["step"] for line in metrics(two)] == [1, 2, 3]
    largest, mean = differences(curve(two), curve(one))
    assert (largest < 2e-4, mean < 5e-5) == (True, True), f"largest {largest:.1e}, mean {mean:.1e}"
    assert result(two)["held_out_loss_after"] == pytest.approx(result(one)["held_out_loss_after"], abs=2e-4)
    assert result(two)["real_tokens"] == result(one)["real_tokens"]
