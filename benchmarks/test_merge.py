"""Merging an adapter changes nothing: the largest difference in logits, measured on the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite import RECIPES, Keeper
from lowvram_chat import merge, sft
from lowvram_chat.recipe.load import load_recipe
from lowvram_chat.results.record import Metric

KINDS = ["lora", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("rslora", "dora", "pissa"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_same_function(kind: str, keeper: Keeper, tmp_path: Path) -> None:
    words = [f"adapter.kind={kind}", f"output.dir={tmp_path / 'run'}", "output.sample_prompts=[]", "data.limit=200"]
    recipe = load_recipe(RECIPES["quickstart"], [*words, "data.eval_limit=20", "train.max_steps=12"])
    sft.run(recipe)
    proof, _ = merge.run(tmp_path / "run")
    figures = {
        "to_merged": proof.adapter_to_merged,
        "to_reloaded": proof.adapter_to_reloaded,
        "moved_by_the_adapter": proof.adapter_to_base,
    }
    found = {name: Metric(value=value, unit="1", kind="measured", samples=1) for name, value in figures.items()}
    problem = None if proof.holds(exact=True) else f"logits differ by {proof.adapter_to_merged:.1e}"
    record = keeper.keep("merge", kind, found, problem=problem)
    assert record.status == "passed", record.reason
    assert proof.adapter_to_base > 100 * merge.TOLERANCE  # else the proof would be of nothing
