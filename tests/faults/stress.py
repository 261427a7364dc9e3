"""Kills runs at random moments, resumes them, and compares their weights with those of a run that was not disturbed.

    python -m tests.faults.stress --seed 1 --trials 100

Each trial is a kind of run, one to three `kill -9`, and a resume to the end. The same seed gives the same runs and the same steps
to kill them at; the moment within a step is the machine's. It prints a row for each kind and exits with 1 if a run differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lowvram_chat.training.checkpoints import numbered
from tests.faults.processes import finished, start, steps_of, wait_until
from tests.runs import Bench
from tests.samples import conversations, save_tiny_gpt2, write_jsonl

STEPS = 30
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": {}},
    "packed": {"data__rows": "packed"},
    "8-bit optimizer": {"optimizer": {"name": "adamw_8bit"}},
    "one checkpoint": {"train__save_total_limit": 1, "train__save_steps": 1},
}
"""Kind of run -> its settings."""


def settings_of(kind: str) -> dict[str, Any]:
    """Return the settings of a kind of run."""
    return {"train__max_steps": STEPS, "train__save_steps": 3, **KINDS[kind]}


def digest(run: Path) -> str:
    """Return the digest of a finished run's weights."""
    [weights] = [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def trial(bench: Bench, kind: str, expected: str, rng: random.Random) -> str:
    """Kill a run one to three times and let it end; return what came of it."""
    run, recipe = bench.folder / "r", str(bench.file("r", **settings_of(kind)))
    shutil.rmtree(run, ignore_errors=True)
    outcome = "equal"
    for step in sorted(rng.sample(range(1, STEPS), rng.randint(1, 3))):
        process = start(["sft", recipe, _how(run)], bench.folder)
        try:
            wait_until(lambda step=step: bool(steps_of(run) >= step), process)  # type: ignore[misc]
        except AssertionError:  # it ended before that step was seen
            if process.wait() != 0:
                return "failed"
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        if not numbered(run / "checkpoints"):
            outcome = "equal, from the start (no checkpoint was due)"
    code, output = finished(["sft", recipe, _how(run)], bench.folder)
    if code != 0 or "Traceback" in output:
        print(output)
        return "failed"
    return outcome if digest(run) == expected else "DIFFERENT"


def _how(run: Path) -> str:
    """Return how to start: a run without a checkpoint starts again."""
    return "--resume" if numbered(run / "checkpoints") else "--overwrite"


def main() -> int:
    """Run the trials, print the table, and return 1 if a run differs or fails."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--trials", type=int, default=100)
    args = arguments.parse_args()
    rng = random.Random(args.seed)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(
            folder,
            save_tiny_gpt2(folder / "m"),
            write_jsonl(folder / "train.jsonl", conversations(64, seed=1)),
            write_jsonl(folder / "held_out.jsonl", conversations(16, seed=2)),
        )
        expected = {}
        for kind in KINDS:
            code, output = finished(["sft", str(bench.file("whole", **settings_of(kind))), "--overwrite"], folder)
            assert code == 0, output
            expected[kind] = digest(folder / "whole")
        for number in range(args.trials):
            kind = list(KINDS)[number % len(KINDS)]
            outcomes[kind][trial(bench, kind, expected[kind], rng)] += 1
    print(f"| `kill -9` at random steps, then `--resume` (seed {args.seed}) | tried | result |\n|---|---|---|")
    for kind, counted in outcomes.items():
        print(f"| {kind} | {counted.total()} | {', '.join(f'{count} {what}' for what, count in counted.items())} |")
    return int(any(what in ("DIFFERENT", "failed") for counted in outcomes.values() for what in counted))


if __name__ == "__main__":
    raise SystemExit(main())
