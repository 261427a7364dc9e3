"""How long a plan takes, imports included: a yes-or-no must come before patience ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.suite import RECIPES, Keeper
from lowvram_chat.results.record import spread

SECONDS = 10.0
"""What a plan of GPT-2 small may take on two free cores."""


@pytest.mark.parametrize("name", ["full_fp16", "lora_fp16", "qlora_nf4"])
def test_planning_gpt2_small_is_quick(name: str, keeper: Keeper) -> None:
    words = [sys.executable, "-m", "lowvram_chat.plan", str(RECIPES[name])]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(words, check=True, capture_output=True)
        seconds.append(time.monotonic() - started)
    taken = spread(seconds, "s", better="lower", tolerance=0.25)
    problem = None if taken.value <= SECONDS else f"{taken.value:.1f} s, {SECONDS:.0f} wanted"
    record = keeper.keep("plan_time", name, {"seconds": taken}, problem=problem)
    assert record.status == "passed", record.reason
