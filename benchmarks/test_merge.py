"""Merging an adapter does not change the model's function: the largest difference in logits, on the built-in model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.exporting.proof import MAX_LOGIT_DIFFERENCE, Proof
from lowvram_chat.results.record import Metric

KINDS = ["lora", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("rslora", "dora", "pissa"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_same_function(kind: str, keeper: Keeper, tmp_path: Path) -> None:
    words = [f"adapter.kind={kind}", f"output.dir={tmp_path / 'run'}", "output.sample_prompts=[]", "data.limit=200"]
    words += ["data.eval_limit=20", "train.max_steps=12"]
    # In their own processes, on the CPU: this process must not hold memory of a GPU that another case measures.
    cpu_only = {"CUDA_VISIBLE_DEVICES": "-1"}
    processes.run([sys.executable, "-m", "lowvram_chat.sft", str(RECIPES["quickstart"]), *words], cpu_only)
    output = processes.run(
        [sys.executable, "-m", "lowvram_chat.merge", str(tmp_path / "run"), "--json"], cpu_only
    ).stdout
    document = json.loads(output.splitlines()[-1])
    proof = Proof(**{name: document[name] for name in ("adapter_to_merged", "adapter_to_reloaded", "adapter_to_base")})
    figures = {
        "to_merged": proof.adapter_to_merged,
        "to_reloaded": proof.adapter_to_reloaded,
        "moved_by_the_adapter": proof.adapter_to_base,
    }
    metrics = {name: Metric(value=value, unit="1", kind="measured") for name, value in figures.items()}
    problem = None if proof.holds(exact=True) else f"logits differ by {proof.adapter_to_merged:.1e}"
    record = keeper.keep("merge", kind, metrics, problem=problem)
    assert record.status == "passed", record.reason
    assert proof.adapter_to_base > 100 * MAX_LOGIT_DIFFERENCE  # else the proof would be empty
