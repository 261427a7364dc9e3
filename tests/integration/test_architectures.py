"""Every model family works in every command, or is refused with the reason; `docs/models.md` has the table.

pytest -m architectures     all families, some minutes; without it the few of `ALWAYS` run
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lowvram_chat import api, chat, evaluate, merge, plan, sft
from lowvram_chat.data.rows import Collator
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import load_model
from lowvram_chat.recipe.schema import Model
from tests.architectures import COMMANDS, REFUSED
from tests.families import FAMILIES, make
from tests.runs import Bench, result
from tests.samples import conversations, write_jsonl

ALWAYS = ("gpt_neo", "gpt_neox", "llama", "qwen2", "gemma2", "phi3", "granite", "mixtral")
"""Families that run in every test run: eager attention, keys that files name otherwise, scaled and capped logits, experts."""
NAMES = [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.architectures]) for name in FAMILIES]


class Family:
    """A family's model and recipe, on which commands run; each returns "ok" or the reason of a refusal."""

    def __init__(self, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.model = make(name, folder / "model")
        rows = write_jsonl(folder / "train.jsonl", conversations(24, seed=1))
        held_out = write_jsonl(folder / "held_out.jsonl", conversations(4, seed=2))
        self.bench = Bench(folder, self.model, rows, held_out)

    def recipe(self, kind: str) -> Path:
        settings: dict[str, Any] = {"adapter": {"kind": "lora", "r": 4}} if kind == "lora" else {}
        return self.bench.file(kind, train__max_steps=4, train__save_steps=2, model__dropout=0.0, **settings)

    def command(self, main: Any, *words: object) -> str:
        """Return "ok", or the message with which a command refuses."""
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        message = self.capsys.readouterr().err.strip()
        if code == 0 or (main is plan.main and code == 1):
            return "ok"
        assert code == 2, message
        assert "Traceback" not in message
        return message.splitlines()[-1]

    def train(self, kind: str) -> str:
        said = self.command(sft.main, self.recipe(kind))
        if said != "ok":
            assert not (self.bench.folder / kind).exists()
        return said

    def resume(self, kind: str) -> str:
        """Resume a finished run from its first checkpoint; its weights must be those of the whole run."""
        run, weights = (
            self.bench.folder / kind,
            "model/model.safetensors" if kind == "full" else "adapter/adapter_model.safetensors",
        )
        expected = load_file(run / weights)
        shutil.rmtree(run / "checkpoints" / "checkpoint-4")
        shutil.rmtree((run / weights).parent)
        (run / "result.json").unlink()
        said = self.command(sft.main, self.recipe(kind), "--resume")
        if said == "ok":
            found = load_file(run / weights)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        return said

    def evaluate(self, kind: str) -> str:
        """Score a run on its held-out rows; the loss must be the one that training ended with."""
        run = self.bench.folder / kind
        said = self.command(evaluate.main, run)
        if said == "ok":
            assert api.evaluate(run)["assistant"].loss == pytest.approx(result(run)["held_out_loss_after"], abs=1e-4)
        return said


def check_loss(folder: Path) -> None:
    """Compare our loss and the head's gradient with those of all logits."""
    ours = load_model(Model(name=str(folder), fused_gelu=False))
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ours.config._attn_implementation
    )
    attach_loss(ours)
    rows = [{"input_ids": [*range(9, 9 + n)], "labels": [-100] * 4 + [*range(13, 9 + n)]} for n in (24, 17)]
    batch = Collator(0)(rows)
    batch.pop("real_tokens")
    our_loss = ours(**batch)["loss"]
    logits = stock(input_ids=batch["input_ids"], use_cache=False).logits
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    heads = [model.get_output_embeddings().weight for model in (ours, stock)]
    [mine] = torch.autograd.grad(our_loss, [heads[0]])
    [others] = torch.autograd.grad(their_loss, [heads[1]])
    assert torch.allclose(mine, others, rtol=1e-3, atol=1e-5 * others.abs().max().item())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: experts sum over tokens in an order that several threads change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_family_works_or_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = Family(name, tmp_path, capsys)
    check_loss(family.model)
    found = {"plan": family.command(plan.main, family.recipe("full"))}
    for kind in ("full", "lora"):
        found[kind] = family.train(kind)
        if found[kind] == "ok":
            found[f"{kind} resume"] = family.resume(kind)
            found[f"{kind} evaluate"] = family.evaluate(kind)
    if found["lora"] == "ok":
        found["merge"] = family.command(merge.main, tmp_path / "lora")
    trained = next((tmp_path / kind for kind in ("lora", "full") if found[kind] == "ok"), family.model)
    found["chat"] = family.command(chat.main, trained, "--prompt", "Hi", "--max-new-tokens", "3")
    assert set(found) <= set(COMMANDS)
    refused = {command: said for command, said in found.items() if said != "ok"}
    expected = REFUSED.get(name, {})
    assert refused.keys() == expected.keys(), refused
    assert all(words in refused[command] for command, words in expected.items())
