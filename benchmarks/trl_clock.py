"""Runs the `trl sft` command with a clock attached and nothing else changed.

    python -m benchmarks.trl_clock CLOCK.jsonl --model_name_or_path MODEL --dataset_name DATA ...

Each logged step becomes a line with the seconds since training began and the tokens that TRL has counted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as trainer_module

from lowvram_chat.private_names import check_private_names

check_private_names("transformers.trainer.DEFAULT_CALLBACKS")


class Clock(TrainerCallback):
    """Writes the time of each logged step to the file that the first argument names. A process has one instance."""

    path = Path(sys.argv[1] if len(sys.argv) > 1 else "clock.jsonl")
    started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        Clock.started = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write a line for a logged step."""
        if logs and "num_tokens" in logs:
            line = {"step": state.global_step, "seconds": time.monotonic() - Clock.started}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"real_tokens": float(logs["num_tokens"])}) + "\n")


def main() -> None:
    """Run `trl sft` with the arguments after the first."""
    from trl.scripts.sft import main as train
    from trl.scripts.sft import make_parser

    vars(trainer_module)["DEFAULT_CALLBACKS"].append(Clock)
    sys.argv = ["sft", *sys.argv[2:]]
    train(*make_parser().parse_args_and_config(fail_with_unknown_args=False)[:4])


if __name__ == "__main__":
    main()
