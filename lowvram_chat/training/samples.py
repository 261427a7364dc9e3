"""What the model answers to a few questions before the run and after it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lowvram_chat.files import write_json
from lowvram_chat.model.compilation import uncompiled
from lowvram_chat.model.pretrained import positions_of
from lowvram_chat.model.saved import DEFAULT_POSITIONS
from lowvram_chat.model.scoring import autocast
from lowvram_chat.training.run_dir import RunDir

MAX_NEW_TOKENS = 48
TEMPERATURE, TOP_P = 0.7, 0.9


@dataclass(frozen=True)
class Sample:
    """A question and its answers."""

    prompt: str
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class SampleGenerator:
    """A model that can be asked."""

    model: Any
    tokenizer: Any
    precision: str

    def answer(self, prompt: str) -> str:
        """Return what the model answers; random states are as before.

        One answer needs the memory of one short row, far less than a training step does.
        """
        tokens = self._tokens(prompt)
        device, was_training = tokens.device, self.model.training
        self.model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            uncompiled(self.model),
            autocast(device.type, self.precision),
        ):
            torch.manual_seed(0)
            output = self.model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=self._sampling()
            )
        self.model.train(was_training)
        return str(self.tokenizer.decode(output[0, tokens.size(1) :], skip_special_tokens=True)).strip()

    def _tokens(self, prompt: str) -> torch.Tensor:
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        room = (positions_of(self.model.config) or DEFAULT_POSITIONS) - MAX_NEW_TOKENS
        tokens: torch.Tensor = encoded["input_ids"][:, -room:]
        return tokens.to(next(self.model.parameters()).device)

    def _sampling(self) -> Any:
        from transformers import GenerationConfig

        end = self.tokenizer.eos_token_id
        return GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            min_new_tokens=1,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            eos_token_id=end,
            pad_token_id=end,
        )


def take_samples(run: RunDir, when: Literal["before", "after"], prompts: list[str], speaker: SampleGenerator) -> None:
    """Let a model answer each prompt, and keep the answers in the run folder."""
    samples = {sample.prompt: sample for sample in read_samples(run)}
    answers = {prompt: speaker.answer(prompt) for prompt in prompts}
    kept = [replace(samples.get(prompt, Sample(prompt)), **{when: text}) for prompt, text in answers.items()]
    write_json(run.samples_file, [asdict(sample) for sample in kept])


def read_samples(run: RunDir) -> list[Sample]:
    """Return the kept answers; none where there is no file."""
    path: Path = run.samples_file
    return [Sample(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
