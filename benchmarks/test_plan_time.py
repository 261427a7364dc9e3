"""A plan takes at most ten seconds, imports included."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.plans import Plans
from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.results.record import spread

MAX_SECONDS = 10.0
"""The longest time that passes, for a plan of GPT-2 small on two free cores."""
NAMES = ("full_fp16", "lora_fp16", "qlora_nf4")
TURNS = 5


@pytest.fixture(scope="module")
def seconds(plans: Plans) -> dict[str, list[float]]:
    """Return the seconds of each recipe's plans; the recipes take turns, so that a slow minute of the machine affects all."""
    plans.wait()
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in NAMES * TURNS:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "lowvram_chat.plan", str(RECIPES[name])], check=True, capture_output=True)
        taken[name].append(time.monotonic() - started)
    return taken


@pytest.mark.parametrize("name", NAMES)
def test_planning_gpt2_small_is_quick(name: str, seconds: dict[str, list[float]], keeper: Keeper) -> None:
    taken = spread(seconds[name], "s", better="lower", tolerance=0.25)
    problem = None if taken.value <= MAX_SECONDS else f"{taken.value:.1f} s, at most {MAX_SECONDS:.0f} expected"
    record = keeper.keep("plan_time", name, {"seconds": taken}, problem=problem)
    assert record.status == "passed", record.reason
