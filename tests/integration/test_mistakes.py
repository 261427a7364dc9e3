"""Every mistake of a user is one clear message with exit code 2: no traceback, no half-written folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPTNeoConfig

from lowvram_chat import chat, evaluate, merge, sft
from lowvram_chat.model.compilation import missing_compiler
from tests.runs import Bench
from tests.samples import conversations, save_tiny_gpt2, write_jsonl

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA graphics card")


def refused(words: list[str], capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int] = sft.main) -> str:
    """Return the words of a refusal; whatever follows its sentence is an indented list."""
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert not printed.out
    sentence = [line for line in printed.err.splitlines() if line and not line.startswith("  ")][
        -1
    ]  # a list may follow
    assert sentence.endswith((".", "?")), sentence
    return printed.err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "typo": (["train.lerning_rate=1"], "train.lerning_rate: there is no such setting. Did you mean 'learning_rate'?"),
    "section": (["trian.seed=1"], "Did you mean 'train'?"),
    "type": (["train.learning_rate=fast"], "train.learning_rate: 'fast'"),
    "choice": (["optimizer.name=adam"], "optimizer.name: 'adam'"),
    "no override": (["train.seed"], "section.key=value"),
    "length": (["data.max_length=2048"], "data.max_length: 2048"),
    "positions": (["data.max_length=512"], "Set data.max_length=256"),
    "builtin": (["model.name=builtin:tiny-gpt3"], "Did you mean 'builtin:tiny-gpt2'?"),
    "builtin data": (["data.source=builtin:chitchats"], "Did you mean 'builtin:chitchat'?"),
    "no network": (["model.name=nosuch-owner/nosuch-model"], "HF_HUB_OFFLINE"),
    "no network for data": (["data.source=nosuch-owner/nosuch-data"], "HF_HUB_OFFLINE"),
    "model folder": (["model.name=./nosuch"], "there is no such folder"),
    "data file": (["data.source=nosuch.jsonl"], "nosuch.jsonl: no file of that name"),
    "eval file": (["data.eval_source=nosuch.jsonl"], "nosuch.jsonl: no file of that name"),
    "template": (["data.chat_template=plane"], "Did you mean 'plain'?"),
    "own template": (["data.chat_template=own"], "no chat template"),
    "target": (["adapter.target_modules=[c_atn]"], "Did you mean 'c_attn'?"),
    "tied target": (["adapter.target_modules=[wte]"], "merges wrongly"),
    "adapter": (["adapter.kind=olora"], "fails on GPT-2's Conv1D"),
    "4bit": (["model.load_in=4bit"], "Add an adapter section"),
    "4bit pissa": (["model.load_in=4bit", "adapter.kind=pissa"], "pissa"),
    "flash": (["model.attention=flash_attention_2", "train.precision=bf16"], "model.attention=sdpa"),
    "hub kernel": (
        ["model.attention=kernels-community/flash-attn2", "train.precision=bf16"],
        "needs the package kernels. Add model.attention=sdpa",
    ),
    "another's kernel": (
        ["model.attention=someone/flash"],
        "known: sdpa, eager, flash_attention_2, and the hub's kernels-c",
    ),
    "attention": (["model.attention=spda"], "Did you mean 'sdpa'?"),
    "packed and masked": (["data.rows=packed", "data.attention_mask=true"], "told apart by their positions"),
    "fp16 sums": (["train.fp16_accumulation=true"], "Leave it out, or set train.precision=fp16"),
    "tracker": (["output.report_to=[nosuch]"], ". Remove it from output.report_to."),
    "tracker's package": (
        ["output.report_to=[comet_ml]"],
        "Install it, or remove it from output.report_to",
    ),
    "eval": (["data.eval_fraction=0.1"], "exclude each other"),
    "steps": (["--max-steps", "0"], "train.max_steps"),
    "resume": (["--resume"], "no whole checkpoint"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_recipe(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[name]
    assert expected in refused([str(bench.file("r")), *words], capsys)
    assert [path.name for path in bench.folder.iterdir()] == ["r.yaml"]


@on_cpu
def test_fp16_on_a_cpu_names_the_override(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.precision=fp32" in refused([str(bench.file("r")), "train.precision=fp16"], capsys)
    assert not (bench.folder / "r").exists()


def test_a_missing_recipe(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.file("quickstart")
    message = refused([str(bench.folder / "quikstart.yaml")], capsys)
    assert "there is no such recipe file. Did you mean 'quickstart.yaml'?" in message


@pytest.mark.parametrize("content", [b"train: [1,\n", b"a: b: c\n", b"- 1\n", b"\xff\xfe\x00", b"train:\n\tseed: 1\n"])
def test_wrong_yaml(content: bytes, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.folder / "r.yaml").write_bytes(content)
    assert "r.yaml" in refused([str(bench.folder / "r.yaml")], capsys)


ROWS: dict[str, tuple[list[Any], str]] = {
    "empty": ([], "no row to train on"),
    "no answer": ([{"messages": [{"role": "user", "content": "Hi"}]}], ":1: no assistant turn"),
    "bad row": ([*conversations(3, 0), {"messages": "Hi"}], ":4: 'messages' is text, not a list"),
    "no messages": ([*conversations(3, 0), {"foo": 1}], ":4: 'messages' is missing; the row has 'foo'"),
    "no message": ([*conversations(3, 0), {"messages": []}], ":4: the conversation is empty"),
    "not an object": ([*conversations(3, 0), 5], ":4: not a JSON object"),
    "columns": ([{"question": "Hi", "answer": "Ho"}], "no known format has the columns question, answer"),
    "too long": (
        [{"messages": [{"role": "user", "content": "no " * 99}, {"role": "assistant", "content": "yes"}]}],
        "data.max_length",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_data_that_cannot_be_used(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows, expected = ROWS[name]
    path = write_jsonl(bench.folder / "mine.jsonl", rows)
    assert expected in refused([str(bench.file("r")), f"data.source={path}"], capsys)
    assert not (bench.folder / "r").exists()


def test_a_run_folder_that_cannot_be_made(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.folder / "file").write_text("", encoding="utf-8")
    assert "output.dir" in refused([str(bench.file("r")), f"output.dir={bench.folder / 'file' / 'run'}"], capsys)


def test_a_held_out_part_that_leaves_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.eval_source=null", "data.eval_fraction=0.9", "data.limit=1"]
    assert "data.eval_fraction" in refused([str(bench.file("r")), *words], capsys)
    assert not (bench.folder / "r").exists()


@pytest.mark.parametrize("main", [merge.main, chat.main, evaluate.main], ids=["merge", "chat", "evaluate"])
def test_a_run_that_is_not_there(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("./nosuch", str(tmp_path / "nosuch"), str(tmp_path)):
        words = [name, "--prompt", "Hi"] if main is chat.main else [name]
        words += ["builtin:chitchat-held-out"] if main is evaluate.main else []
        assert name in refused(words, capsys, main)


@pytest.mark.parametrize("main", [merge.main, chat.main, evaluate.main], ids=["merge", "chat", "evaluate"])
def test_a_run_that_has_not_ended(
    main: Callable[[list[str]], int], lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_bytes((lora_run / "recipe.yaml").read_bytes())
    words = [str(run), "--prompt", "Hi"] if main is chat.main else [str(run)]
    assert "--resume" in refused(words, capsys, main)


def adapter_with_base(lora_run: Path, folder: Path, base: str) -> Path:
    """Return a copy of an adapter, without its run, that names another base."""
    folder.mkdir()
    for file in (lora_run / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize("main", [chat.main, evaluate.main], ids=["chat", "evaluate"])
def test_an_adapter_of_another_base(
    main: Callable[[list[str]], int], lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_gpt2(tmp_path / "other", width=32)
    adapter = adapter_with_base(lora_run, tmp_path / "adapter", str(other))
    words = [str(adapter), "--prompt", "Hi"] if main is chat.main else [str(adapter), "builtin:chitchat-held-out"]
    assert "was trained on another base model" in refused(words, capsys, main)


def test_an_adapter_whose_base_is_gone(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_with_base(lora_run, tmp_path / "adapter", "./gone")
    assert "./gone" in refused([str(adapter), "--prompt", "Hi"], capsys, chat.main)


def test_a_merge_onto_a_base_that_is_gone(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(lora_run), "--base", "./gone", "--out", str(tmp_path / "m")]
    assert "./gone" in refused(words, capsys, merge.main)
    assert not list(tmp_path.iterdir())


def test_compiling_without_a_compiler_names_what_is_missing(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram_chat.model.compilation.missing_compiler", lambda _: "a C++ compiler (g++ or clang)")
    said = refused([str(bench.file("run")), "train.compile=true"], capsys)
    assert "train.compile: this machine lacks a C++ compiler (g++ or clang). Install it, or add" in said
    assert sft.main([str(bench.file("run")), "train.compile=if_possible", "--max-steps", "1"]) == 0
    assert "not compiled, since this machine lacks a C++ compiler" in capsys.readouterr().err


def test_compiling_where_it_is_switched_off_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram_chat.model.compilation.missing_compiler", lambda _: None)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    said = refused([str(bench.file("run")), "train.compile=true"], capsys)
    assert "TORCHDYNAMO_DISABLE=1 switches torch.compile off. Unset that variable, or add" in said


@pytest.mark.parametrize(
    ("device", "what", "said"),
    [
        ("cpu", ("sysconfig", "get_path"), "Python.h"),
        ("cpu", ("torch._inductor.cpp_builder", "get_cpp_compiler"), "a C++ compiler"),
        ("cuda", ("sysconfig", "get_path"), "Python.h"),
        ("cuda", ("shutil", "which"), "a C compiler"),
        ("cuda", ("torch.utils._triton", "has_triton"), "Triton"),
    ],
)
def test_what_compiling_needs_is_looked_for(
    device: str, what: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lacking(*_: object) -> str | None:
        if what[1] == "get_cpp_compiler":
            raise RuntimeError("no compiler")
        return str(tmp_path / "nothing") if what[1] == "get_path" else None

    # A machine that has it all, whatever this one has.
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    assert missing_compiler(torch.device(device)) is None
    monkeypatch.setattr(".".join(what), lacking)
    missing = missing_compiler(torch.device(device))
    if sys.platform == "win32" and what[1] == "which":  # Triton brings its own there
        assert missing is None
    else:
        assert missing is not None
        assert said in missing


def test_packing_rows_for_a_model_that_cannot_tell_them_apart_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram_chat.model.isolation.isolates_documents", lambda _: False)
    assert "Set data.rows=grouped" in refused([str(bench.file("run")), "data.rows=packed"], capsys)


def test_attention_that_transformers_lacks_for_a_model(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "neo"
    shutil.copytree(bench.model, folder)
    config = GPTNeoConfig(
        vocab_size=8192, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = [str(bench.file("r", train__max_steps=1)), f"model.name={folder}"]
    assert sft.main(words) == 0
    assert "has no sdpa attention in transformers, so eager attention is used" in capsys.readouterr().err


def test_a_model_that_is_not_causal(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "bert"
    shutil.copytree(bench.model, folder)  # the tokenizer
    config = BertConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = refused([str(bench.file("r")), f"model.name={folder}", "data.rows=packed"], capsys)
    assert "it is not a causal language model" in message
    assert not (bench.folder / "r").exists()
