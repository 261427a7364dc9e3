"""The `sft` command, one step at a time: each optimizer step waits for a line on stdin, and its seconds are said on stdout.

    python -m benchmarks.turn_clock RECIPE ...

`bench_turns` holds two such runs against each other.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback
from transformers import trainer as trainer_module

from benchmarks.bench_turns import STEP
from lowvram_chat import sft


class Turns(TrainerCallback):
    """Times each step from the word to go to its end, the fetching of its rows included."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._say_and_wait(0.0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._say_and_wait(time.perf_counter() - self.started)

    def _say_and_wait(self, seconds: float) -> None:
        print(f"{STEP}{seconds}", flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()


if __name__ == "__main__":
    module: Any = trainer_module
    module.DEFAULT_CALLBACKS.append(Turns)
    sys.exit(sft.main(sys.argv[1:]))
