"""Runs the `sft` command one step at a time.

    python -m benchmarks.turn_clock RECIPE ...

Each optimizer step waits for a line on stdin, and its seconds are printed on stdout. `bench_turns` compares two such runs.
"""

from __future__ import annotations

import sys
import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as trainer_module

from benchmarks.bench_turns import STEP
from lowvram_chat import sft
from lowvram_chat.private_names import check_private_names

check_private_names("transformers.trainer.DEFAULT_CALLBACKS")


class TurnClock(TrainerCallback):
    """Times each step from the line on stdin to the step's end, including the fetching of its rows."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Report that the run is ready, and wait."""
        self._report_and_wait(0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Report the step's seconds, and wait."""
        self._report_and_wait(time.perf_counter() - self.started)

    def _report_and_wait(self, seconds: float) -> None:
        print(f"{STEP}{seconds}", flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()


if __name__ == "__main__":
    vars(trainer_module)["DEFAULT_CALLBACKS"].append(TurnClock)
    sys.exit(sft.main(sys.argv[1:]))
