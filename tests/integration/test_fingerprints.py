"""An adapter is used only with its own base, and a run is resumed only on its own base, rows, tokenizer and template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_chat import api, chat, merge, sft
from lowvram_chat.errors import ModelError
from lowvram_chat.model.adapters import add_adapter, load_adapter, save_adapter
from lowvram_chat.model.fingerprint import FINGERPRINT_FILE, Fingerprint, fingerprint
from lowvram_chat.model.pretrained import load_model
from lowvram_chat.recipe.schema import Adapter, Model
from lowvram_chat.training.run_dir import RunDir
from tests.families import make
from tests.runs import Bench, curve
from tests.samples import conversations, save_tiny_gpt2, write_jsonl

LORA = {"kind": "lora", "r": 4}
TEMPLATE = (
    "{%- for m in messages -%}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{%- endfor -%}"
)


def base_and_adapter(tiny: Path, folder: Path) -> Path:
    """Save an untrained adapter of the tiny model and return its folder."""
    settings = Model(name=str(tiny))
    model = load_model(settings)
    base = fingerprint(model, settings)
    save_adapter(add_adapter(model, Adapter(r=4)), folder, "tiny", base)
    return folder


def other_seed(tiny: Path, folder: Path) -> Path:
    return save_tiny_gpt2(folder, seed=1)


def slightly_trained(tiny: Path, folder: Path) -> Path:
    """Return a copy whose weight matrices differ by 1e-6, as after a few steps at a low rate."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    moved = {name: value * (1 + 1e-6) if value.dim() == 2 else value for name, value in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fewer_tokens(tiny: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(8000)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", [other_seed, slightly_trained, fewer_tokens])
def test_an_adapter_is_refused_on_another_base(
    change: Callable[[Path, Path], Path], tiny: Path, tmp_path: Path
) -> None:
    adapter = base_and_adapter(tiny, tmp_path / "adapter")
    settings = Model(name=str(change(tiny, tmp_path / "other")))
    with pytest.raises(ModelError, match="this adapter was trained on another base model"):
        load_adapter(load_model(settings), adapter, settings)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("saved_in", ["float32", "bfloat16"])
def test_an_adapter_is_accepted_on_its_base_in_another_type(
    dtype: str, saved_in: str, tiny: Path, tmp_path: Path
) -> None:
    before = Model.model_validate({"name": str(tiny), "dtype": saved_in})
    model = load_model(before)
    base = fingerprint(model, before)
    save_adapter(add_adapter(model, Adapter(r=4)), tmp_path / "adapter", "tiny", base)
    settings = Model.model_validate({"name": str(tiny), "dtype": dtype})
    load_adapter(load_model(settings), tmp_path / "adapter", settings)


@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "qlora"])
def test_the_merged_model_is_not_the_base_any_more(kind: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"kind": "lora" if kind == "qlora" else kind, "r": 4}
    run = bench.run(kind, adapter=adapter, model__load_in="4bit" if kind == "qlora" else None, train__max_steps=2)
    merged = api.merge(run).path
    assert merge.main([str(run), "--base", str(merged), "--out", str(bench.folder / "twice")]) == 2
    assert "trained on another base model" in capsys.readouterr().err
    assert not (bench.folder / "twice").exists()


def test_a_damaged_fingerprint_is_refused_and_a_missing_one_is_told_of(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, settings = base_and_adapter(tiny, tmp_path / "adapter"), Model(name=str(tiny))
    (adapter / FINGERPRINT_FILE).write_text('{"weights": 3}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"base_fingerprint\.json: is damaged"):
        load_adapter(load_model(settings), adapter, settings)
    (adapter / FINGERPRINT_FILE).unlink()
    load_adapter(load_model(settings), adapter, settings)
    assert "so its base model is not checked" in caplog.text


def test_a_fingerprint_survives_json(tiny: Path) -> None:
    settings = Model(name=str(tiny))
    found = fingerprint(load_model(settings), settings)
    assert Fingerprint.from_json(found.to_json()) == found
    assert len(found.weights) == len(list(load_model(settings).parameters()))


def test_an_adapter_without_a_tokenizer_opens_with_that_of_its_base(lora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    for file in run.glob("adapter/*token*"):
        file.unlink()
    assert chat.main([str(run), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0


def fewer_rows(bench: Bench) -> None:
    lines = bench.train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    bench.train_file.write_text("".join(lines[:40]), encoding="utf-8")


def other_base(bench: Bench) -> None:
    save_tiny_gpt2(bench.model, seed=1)


def other_template(bench: Bench) -> None:
    (bench.folder / "mine.jinja").write_text(TEMPLATE.replace(": ", "> "), encoding="utf-8")


def other_tokenizer(bench: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    tokenizer.pad_token = "the"
    tokenizer.save_pretrained(bench.model)


CHANGES: dict[str, tuple[Callable[[Bench], None], str]] = {
    "rows": (fewer_rows, "the training rows changed since"),
    "base": (other_base, "the weights or the configuration of the base model changed"),
    "template": (other_template, "the chat template and the training rows changed since"),
    "tokenizer": (other_tokenizer, "the tokenizer"),
}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_over_something_else(
    name: str, adapter: dict[str, object] | None, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    rows = write_jsonl(tmp_path / "train.jsonl", conversations(48, seed=1))
    bench = Bench(tmp_path, model, rows, write_jsonl(tmp_path / "held_out.jsonl", conversations(4, seed=2)))
    (tmp_path / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    settings = {"train__save_steps": 2, "data__chat_template": str(tmp_path / "mine.jinja"), "adapter": adapter}
    run = bench.run("r", train__max_steps=3, **settings)
    (run / "result.json").unlink()
    before = sorted(run.rglob("*"))
    change, words = CHANGES[name]
    change(bench)
    assert sft.main([str(bench.file("r", train__max_steps=5, **settings)), "--resume"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_with_a_damaged_fingerprint_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.run("r", train__max_steps=3, train__save_steps=2)
    checkpoint = RunDir(run).last_checkpoint()
    assert checkpoint is not None
    (checkpoint / "manifest.json").unlink()  # as an earlier version wrote it
    (checkpoint / "lowvram_chat_fingerprint.json").write_text("{", encoding="utf-8")
    assert sft.main([str(bench.file("r", train__max_steps=5, train__save_steps=2)), "--resume"]) == 2
    assert "is damaged" in capsys.readouterr().err
    (checkpoint / "lowvram_chat_fingerprint.json").unlink()
    assert sft.main([str(bench.file("r", train__max_steps=5, train__save_steps=2)), "--resume"]) == 0
    assert "so it is not checked that base, tokenizer and rows are the same" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_a_resumed_full_run_has_its_weights_where_files_name_them_otherwise(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    make(kind, tmp_path / "model")
    settings = {"model__name": str(tmp_path / "model"), "train__save_steps": 3}
    whole = bench.run("whole", train__max_steps=6, **settings)
    bench.run("half", train__max_steps=6, **settings)
    half = bench.folder / "half"
    for path in (half / "checkpoints" / "checkpoint-6", half / "model"):
        shutil.rmtree(path)
    (half / "result.json").unlink()
    api.train(bench.recipe("half", train__max_steps=6, **settings), resume=True)
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (whole, half))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(half) == curve(whole)


def test_a_longer_run_takes_no_step_at_rate_0_and_says_that_the_schedule_changed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    run = bench.run("r", train__max_steps=6, train__save_steps=6, train__warmup_ratio=0.0)
    api.train(bench.recipe("r", train__max_steps=12, train__save_steps=6, train__warmup_ratio=0.0), resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    whole = bench.run("whole", train__max_steps=12, train__warmup_ratio=0.0)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert {step: rates[step] for step in range(7, 13)} == {step: expected[step] for step in range(7, 13)}
    assert "the learning-rate schedule has changed with the recipe: after step 6 the rate is" in caplog.text
