"""Answers to the sample prompts of a recipe, before and after the run."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from lowvram_chat.files import write_json
from lowvram_chat.model.compilation import uncompiled
from lowvram_chat.model.generation import encode_messages, generate
from lowvram_chat.model.pretrained import positions_of
from lowvram_chat.model.sampling import Sampling
from lowvram_chat.model.saved import DEFAULT_POSITIONS
from lowvram_chat.model.scoring import autocast
from lowvram_chat.training.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_chat.training.model_setup import TrainedModel

log = logging.getLogger(__name__)

SAMPLING = Sampling(max_new_tokens=48)


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it."""

    prompt: str
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class SampleGenerator:
    """Generates answers with the model that is being trained."""

    model: TrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: str

    def answer(self, prompt: str) -> str:
        """Return the model's answer; random states are as before.

        One answer needs the memory of one short row, far less than a training step.
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
            answer = generate(self.model, self.tokenizer, tokens, SAMPLING)
        self.model.train(was_training)
        return answer

    def _tokens(self, prompt: str) -> torch.Tensor:
        """Return the (1, T) prompt, cut on the left so that an answer fits the model's positions."""
        tokens = encode_messages(self.tokenizer, [{"role": "user", "content": prompt}])
        room = (positions_of(self.model.config) or DEFAULT_POSITIONS) - SAMPLING.max_new_tokens
        return torch.tensor([tokens[-room:]], device=next(self.model.parameters()).device)


def take_samples(run: RunDir, when: Literal["before", "after"], prompts: list[str], generator: SampleGenerator) -> None:
    """Answer each prompt and keep the answers in the run folder."""
    samples = {sample.prompt: sample for sample in read_samples(run)}
    answered = []
    for prompt in prompts:
        sample, answer = samples.get(prompt, Sample(prompt)), generator.answer(prompt)
        answered.append(replace(sample, before=answer) if when == "before" else replace(sample, after=answer))
    write_json(run.samples_file, [asdict(sample) for sample in answered])


def read_samples(run: RunDir) -> list[Sample]:
    """Return the answers that were kept; none if there is no file."""
    if not run.samples_file.is_file():
        return []
    try:
        return [Sample(**entry) for entry in json.loads(run.samples_file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        log.warning("%s: is damaged, so its answers are left out", run.samples_file)
        return []
