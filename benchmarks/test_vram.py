"""Every recipe's predicted memory against its card, and how long a plan takes. Predicted, not measured: no GPU is used."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowvram_chat.memory.plan import plan
from lowvram_chat.recipe.gpus import MIB
from lowvram_chat.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SPARE_MIB = 150
"""What a shipped recipe leaves free on Linux."""
SECONDS = 10.0
"""What a plan of GPT-2 small may take, imports included, on two free cores."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_vram_of_a_recipe_fits_its_card_with_room_to_spare(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.model.name.startswith("models/"):  # made by `make smollm2`: planned by its hub name, whose shape is known
        model = recipe.model.model_copy(update={"name": "HuggingFaceTB/SmolLM2-135M-Instruct"})
        recipe = recipe.model_copy(update={"model": model})
    planned = plan(recipe)
    spare = planned.limits["linux"] - planned.on_card_bytes
    print(f"{path.stem}: {planned.on_card_bytes / MIB:,.0f} MiB predicted on the card, {spare / MIB:,.0f} to spare")
    assert planned.fits_on["linux"]
    assert spare >= SPARE_MIB * MIB


def test_a_recipe_that_is_too_large_does_not_fit() -> None:
    too_large = load_recipe(ROOT / "recipes" / "full_fp16.yaml", ["train.per_device_train_batch_size=32"])
    assert not plan(too_large).fits_on["linux"]


@pytest.mark.parametrize("recipe", ["full_fp16", "lora_fp16", "qlora_nf4"])
def test_planning_gpt2_small_is_quick(recipe: str) -> None:
    words = [sys.executable, "-m", "lowvram_chat.plan", str(ROOT / "recipes" / f"{recipe}.yaml")]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(words, check=True, capture_output=True)
        seconds.append(time.monotonic() - started)
    print(f"plan of {recipe}: {statistics.median(seconds):.1f} s (of {', '.join(f'{s:.1f}' for s in seconds)})")
    assert statistics.median(seconds) <= SECONDS
