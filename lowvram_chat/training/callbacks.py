"""What is written while a run goes on: metrics.jsonl and the token counts; `display` shows the same."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowvram_chat.files import write_json
from lowvram_chat.training.display import Display
from lowvram_chat.training.resident import peak_resident_bytes
from lowvram_chat.training.run_dir import COUNTS_FILE, RunDir


@dataclass
class TokenCounts:
    """What the run has worked through so far; survives `--resume`."""

    real_tokens: int = 0
    """Tokens of the data."""
    padded_tokens: int = 0
    """Tokens of the batches: the data's and the padding's."""
    seconds: float = 0.0
    """Time spent in training, evaluations and checkpoints included."""

    def add(self, real: int, padded: int) -> None:
        """Count one micro-batch."""
        self.real_tokens += real
        self.padded_tokens += padded

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> TokenCounts:
        """Return the counts kept with a checkpoint."""
        return cls(**json.loads((checkpoint / COUNTS_FILE).read_text(encoding="utf-8")))


class MetricsCallback(TrainerCallback):
    """Writes a line of metrics.jsonl at every logged step, keeps the clock, and shows where the run is."""

    def __init__(self, run: RunDir, counts: TokenCounts, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: what the allocator may take of the card, to be shown."""
        self.run = run
        self.counts = counts
        self.started = self.logged_at = time.monotonic()
        self.seconds_before = counts.seconds
        self.logged = TokenCounts(**asdict(counts))
        self.display = Display(limit_bytes)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.logged_at = time.monotonic()
        self.display.start(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.counts.seconds = self.seconds_before + time.monotonic() - self.started
        self.display.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        if not state.is_world_process_zero or not (logs.keys() & {"loss", "eval_loss"}):
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm", "eval_loss") if name in logs}
        if "loss" in logs:
            line |= self._rates() | peak_memory()
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.display.show(line)

    def _rates(self) -> dict[str, float]:
        """Return the tokens per second since the last logged step, and all tokens and seconds so far."""
        now = time.monotonic()
        seconds = max(now - self.logged_at, 1e-9)
        rates = {
            "real_tokens_per_second": round((self.counts.real_tokens - self.logged.real_tokens) / seconds, 1),
            "padded_tokens_per_second": round((self.counts.padded_tokens - self.logged.padded_tokens) / seconds, 1),
            "real_tokens": self.counts.real_tokens,
            "seconds": round(self.counts.seconds, 3),
        }
        self.logged_at, self.logged = now, TokenCounts(**asdict(self.counts))
        return rates

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = self.run.checkpoints / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / COUNTS_FILE, asdict(self.counts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.display.close()


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process: on CUDA what the allocator took, elsewhere the resident set."""
    if torch.cuda.is_available():
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"peak_resident_bytes": peak_resident_bytes()}
