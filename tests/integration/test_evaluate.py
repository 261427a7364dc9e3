"""Evaluation agrees with a loss worked out by plain transformers, and with the run's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from lowvram_chat import api, evaluate
from tests.runs import Bench, result
from tests.samples import write_jsonl


@torch.no_grad()
def by_hand(model_folder: Path, file: Path, *, max_length: int) -> dict[str, tuple[float, int]]:
    """Return (mean loss, tokens) on the assistant's words and on all, one conversation at a time, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (model_folder / "chat_template_training.jinja").read_text(encoding="utf-8")  # with marks
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    sums = {"assistant": [0.0, 0], "all": [0.0, 0]}
    for line in file.read_text(encoding="utf-8").splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert isinstance(encoded, BatchEncoding)
        ids = torch.tensor(encoded["input_ids"][:max_length])
        mask = torch.tensor(encoded["assistant_masks"][:max_length]).bool()[1:]
        losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        for name, chosen in {"assistant": mask, "all": torch.ones_like(mask)}.items():
            sums[name][0] += losses[chosen].sum().item()
            sums[name][1] += int(chosen.sum())
    return {name: (total / count, int(count)) for name, (total, count) in sums.items()}


def test_scores_agree_with_plain_transformers(full_run: Path, held_out_file: Path) -> None:
    scores = api.evaluate(str(full_run), [str(held_out_file)])
    for name, (loss, tokens) in by_hand(full_run / "model", held_out_file, max_length=64).items():
        assert scores[name].tokens == tokens
        assert scores[name].loss == pytest.approx(loss, abs=1e-5)
        assert scores[name].perplexity == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_a_run_is_scored_on_its_own_held_out_part(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run)
    loss = api.evaluate(str(folder), [])["assistant"].loss
    assert loss == pytest.approx(result(folder)["held_out_loss_after"], abs=1e-5)


def test_a_run_with_a_held_out_fraction_is_scored_on_it(bench: Bench) -> None:
    run = bench.run("r", data__eval_source=None, data__eval_fraction=0.25, train__max_steps=3)
    loss = api.evaluate(str(run), [])["assistant"].loss
    assert loss == pytest.approx(result(run)["held_out_loss_after"], abs=1e-5)


def test_the_table_and_the_json_say_the_same(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(full_run), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads(lines[-1])
    assert lines[0].split() == ["loss", "on", "loss", "perplexity", "tokens"]
    assert lines[1].split()[:2] == ["assistant", f"{scores['assistant']['loss']:.4f}"]
    assert lines[2].split()[:2] == ["all", f"{scores['all']['loss']:.4f}"]


def test_a_model_folder_is_scored_on_files(tiny: Path, held_out_file: Path) -> None:
    scores = api.evaluate(str(tiny), [str(held_out_file)])
    assert scores["assistant"].loss == pytest.approx(math.log(8192), abs=0.2)
    assert 0 < scores["assistant"].tokens < scores["all"].tokens


def test_a_limit_counts_conversations(tiny: Path, held_out_file: Path) -> None:
    few = api.evaluate(str(tiny), [str(held_out_file)], limit=4)
    whole = api.evaluate(str(tiny), [str(held_out_file)])
    assert few["all"].tokens < whole["all"].tokens


@pytest.mark.parametrize("size", [1, 5])
def test_scores_do_not_depend_on_the_batch(size: int, tiny: Path, held_out_file: Path) -> None:
    one = api.evaluate(str(tiny), [str(held_out_file)], batch_size=size)["all"].loss
    assert one == pytest.approx(api.evaluate(str(tiny), [str(held_out_file)])["all"].loss, abs=1e-5)


@pytest.mark.parametrize("words", [[], ["--format", "text"]], ids=["detected", "named"])
def test_plain_text_is_scored_on_all_tokens(
    words: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "novel.jsonl", [{"text": "It was the best of times."}])
    assert evaluate.main([str(tiny), str(path), "--json", *words]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"all"}


def test_a_model_without_data_is_asked_for_some(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tiny)]) == 2
    assert "Name some" in capsys.readouterr().err


WRONG: list[list[str]] = [
    ["--format", "mesages"],
    ["--max-length", "4096"],
    ["--max-length", "512"],  # the model has 256 positions
    ["--limit", "0"],
    ["--max-bad-rows", "-1"],
    ["--batch-size", "0"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_setting_is_a_sentence_with_exit_code_2(
    words: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "no " * 400}, {"role": "assistant", "content": "yes"}]}
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", long)
    assert evaluate.main([str(tiny), str(path), *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_without_a_length_rows_are_held_to_the_models_positions(tiny: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes " * 400}]}
    path = write_jsonl(tmp_path / "chats.jsonl", [long])
    assert api.evaluate(str(tiny), [str(path)])["all"].tokens == 255
