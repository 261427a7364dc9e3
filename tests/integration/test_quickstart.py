"""The first steps of the quickstart: training, merging and an answer, with the losses of the versions in constraints.txt."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_chat import chat, merge
from lowvram_chat.api import train as run
from lowvram_chat.recipe.yaml_file import load_recipe
from tests.runs import result
from tests.samples import ROOT

STEPS = 10
HELD_OUT_LOSS = {"held_out_loss_before": 6.238329, "held_out_loss_after": 5.653891}
"""Of these steps, with the versions in constraints.txt."""
LARGEST_DIFFERENCE = 1e-4


def test_the_quickstart_gives_the_same_losses_and_a_merged_model_that_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "quickstart"
    recipe = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [f"train.max_steps={STEPS}", f"output.dir={folder}", "output.sample_prompts=[]"],
    )
    run(recipe)
    outcome = result(folder)
    assert {name: outcome[name] for name in HELD_OUT_LOSS} == pytest.approx(HELD_OUT_LOSS, abs=LARGEST_DIFFERENCE)
    assert merge.main([str(folder)]) == 0
    capsys.readouterr()
    assert chat.main([str(folder / "merged"), "--prompt", "Hello", "--max-new-tokens", "4", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip()
