"""Writes metrics.jsonl and the token counts while a run trains, and feeds the display."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowvram_chat import stopping
from lowvram_chat.files import json_text, write_json
from lowvram_chat.training.checkpoint_fingerprint import CheckpointFingerprint
from lowvram_chat.training.checkpoints import COUNTS_FILE
from lowvram_chat.training.clock import RunningClock
from lowvram_chat.training.display import Display
from lowvram_chat.training.finite import FiniteGuard
from lowvram_chat.training.process_memory import peak_resident_bytes
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.spill import SpillWatch, look_for_spill

LOGGED_KEYS = ("loss", "learning_rate", "grad_norm", "eval_loss")
"""Figures of the Trainer's logs that are written."""


@dataclass
class TokenCounts:
    """What a run has processed so far; kept in each checkpoint, so that a resumed run continues the counts."""

    real_tokens: int = 0
    """Tokens of the data."""
    padded_tokens: int = 0
    """Tokens of the batches, padding included."""
    seconds: float = 0.0
    """Time spent training, with evaluations and checkpoints."""

    def add(self, real: int, padded: int) -> None:
        """Count one micro-batch."""
        self.real_tokens += real
        self.padded_tokens += padded

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> TokenCounts:
        """Return the counts kept in a checkpoint."""
        return cls(**json.loads((checkpoint / COUNTS_FILE).read_text(encoding="utf-8")))


class MetricsCallback(TrainerCallback):
    """Writes a line of metrics.jsonl at every logged step, measures time, and shows progress."""

    def __init__(
        self,
        run: RunDir,
        counts: TokenCounts,
        fingerprint: CheckpointFingerprint,
        guard: FiniteGuard,
        limit_bytes: int | None = None,
    ) -> None:
        """Create the callback; `limit_bytes` is what the allocator may reserve, to be shown."""
        self.run = run
        self.counts = counts
        self.fingerprint = fingerprint
        self.guard = guard
        self.clock = RunningClock()
        self.started = self.logged_at = self.clock.seconds()
        self.seconds_before = counts.seconds
        self.logged = TokenCounts(**asdict(counts))
        self.display = Display(limit_bytes, clock=self.clock.seconds)
        self.spill = SpillWatch()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock and the display; a resumed run takes its intervals from the recipe, not from the checkpoint."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if getattr(args, name) is not None:
                setattr(state, name, getattr(args, name))
        self.started = self.logged_at = self.clock.seconds()
        self.display.start(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count the time, move the bar, and end the run after a checkpoint if a signal asks for it."""
        self.counts.seconds = self.seconds_before + self.clock.seconds() - self.started
        was_skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self.guard.after_step(state.global_step, was_skipped=was_skipped)
        if stopping.requested():
            control.should_save = control.should_training_stop = True
        self.display.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write and show a line; logs without a loss are the Trainer's own summary, which result.json replaces."""
        logs = dict(logs or {})
        if not state.is_world_process_zero or not (logs.keys() & {"loss", "eval_loss"}):
            return
        line: dict[str, float] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {name: logs[name] for name in LOGGED_KEYS if name in logs}
        if "loss" in logs:
            line |= self._rates() | peak_memory()
            look_for_spill(self.spill, line["padded_tokens_per_second"])
            self.guard.check_logged(state.global_step, line, cast("torch.nn.Module", kwargs["model"]))
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")
        self.display.show(line)

    def _rates(self) -> dict[str, float]:
        """Return the tokens per second since the last logged step, and all tokens and seconds so far."""
        now = self.clock.seconds()
        seconds = max(now - self.logged_at, 1e-9)
        rates = {
            "real_tokens_per_second": round((self.counts.real_tokens - self.logged.real_tokens) / seconds, 1),
            "padded_tokens_per_second": round((self.counts.padded_tokens - self.logged.padded_tokens) / seconds, 1),
            "real_tokens": self.counts.real_tokens,
            "seconds": round(self.counts.seconds, 3),
        }
        self.logged_at, self.logged = now, TokenCounts(**asdict(self.counts))
        return rates

    def complete_checkpoint(self, checkpoint: Path) -> None:
        """Keep the fingerprint and the counts in a checkpoint that is being written."""
        self.fingerprint.write(checkpoint)
        write_json(checkpoint / COUNTS_FILE, asdict(self.counts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop the display and the clock."""
        self.close()

    def close(self) -> None:
        """Stop the display and the clock, after an error too."""
        self.display.close()
        self.clock.close()


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process: the allocator's on CUDA, elsewhere the resident set."""
    if torch.cuda.is_available():
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"peak_resident_bytes": peak_resident_bytes()}
