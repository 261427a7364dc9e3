"""A merged adapter is the same function, in plain transformers, in another process that never saw this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowvram_chat import api, merge
from lowvram_chat.errors import ProofError, UsageError
from lowvram_chat.exporting import merge as merging
from lowvram_chat.exporting.proof import Proof
from tests.runs import Bench
from tests.samples import save_tiny_gpt2

ALONE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_name, found = sys.argv[1], {}
tokens = torch.randint(0, 8192, (3, 48), generator=torch.Generator().manual_seed(7))
for name in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(name + "/merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(name + "/merged")
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, name + "/adapter").eval()(tokens).logits
        found[name] = {
            "difference": (adapted - merged(tokens).logits).abs().max().item(),
            "moved": (adapted - plain).abs().max().item(),
            "tied": merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr(),
            "dtype": str(merged.dtype),
            "text": tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
            ),
        }
assert not [name for name in sys.modules if name.startswith("lowvram_chat")]
print(json.dumps(found))
"""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "r": 8}},
    "rslora": {"adapter": {"kind": "rslora", "r": 8}},
    "dora": {"adapter": {"kind": "dora", "r": 8}},
    "pissa": {"adapter": {"kind": "pissa", "r": 8}},
    "qlora": {"adapter": {"kind": "lora", "r": 8}, "model__load_in": "4bit"},
}


@pytest.fixture(scope="module")
def merged(session_bench: Bench, tiny: Path) -> dict[str, dict[str, Any]]:
    """What a process without this package finds about a merged run of each kind."""
    runs = {kind: session_bench.run(f"merge-{kind}", train__learning_rate=2e-2, **KINDS[kind]) for kind in KINDS}
    for run in runs.values():
        api.merge(run)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tiny), *map(str, runs.values())],
        capture_output=True, text=True, check=True, cwd=session_bench.folder, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return {kind: found[str(run)] | {"run": run} for kind, run in runs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_base_and_adapter_in_plain_transformers(
    kind: str, merged: dict[str, dict[str, Any]]
) -> None:
    assert merged[kind]["difference"] < 1e-4
    assert merged[kind]["moved"] > 0.5  # an adapter that does nothing would prove nothing


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_stay_tied_and_the_template_goes_along(kind: str, merged: dict[str, dict[str, Any]]) -> None:
    assert merged[kind]["tied"]
    assert merged[kind]["dtype"] == "torch.float32"
    assert merged[kind]["text"] == "user: Hi\nassistant:"


@pytest.mark.parametrize("kind", KINDS)
def test_merging_onto_the_full_base_keeps_what_was_learned(
    kind: str, merged: dict[str, dict[str, Any]], session_bench: Bench
) -> None:
    from lowvram_chat.api import evaluate
    from tests.runs import result

    run = merged[kind]["run"]
    loss = evaluate(str(run / "merged"), [str(session_bench.held_out_file)], max_length=64)["assistant"].loss
    assert loss == pytest.approx(result(run)["held_out_loss_after"], abs=0.05 if kind == "qlora" else 1e-4)


def test_a_merge_has_a_card_and_says_where_it_is(
    lora_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert merge.main([str(lora_run), "--out", str(tmp_path / "m"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["out"] == str(tmp_path / "m")
    assert said["adapter_to_reloaded"] < 1e-4 < said["adapter_to_base"]
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "merged into" in card


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_merge_can_be_saved_smaller(dtype: str, lora_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = api.merge(lora_run, out=tmp_path / "m", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert made.proof.adapter_to_merged < 1e-4


def test_an_earlier_merge_is_not_overwritten(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert merge.main([str(lora_run), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_leaves_a_folder_alone_that_is_no_model(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert merge.main([str(lora_run), "--out", str(out), "--overwrite"]) == 2
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_an_earlier_merge(lora_run: Path, tmp_path: Path) -> None:
    assert merge.main([str(lora_run), "--out", str(tmp_path / "m"), "--dtype", "float16"]) == 0
    assert merge.main([str(lora_run), "--out", str(tmp_path / "m"), "--overwrite"]) == 0
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 2_000_000


def test_the_base_is_never_replaced(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_gpt2(tmp_path / "base")
    before = (base / "config.json").read_bytes()
    assert merge.main([str(lora_run), "--base", str(base), "--out", str(base), "--overwrite"]) == 2
    assert "holds the base model" in capsys.readouterr().err
    assert (base / "config.json").read_bytes() == before


def test_an_earlier_merge_survives_a_new_one_that_cannot_be_moved_into_its_place(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    api.merge(lora_run, out=out)
    (out / "mine.txt").write_text("kept")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith("-new"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert merge.main([str(lora_run), "--out", str(out), "--overwrite"]) == 2
    told = capsys.readouterr().err
    assert "cannot be written (Permission denied)" in told
    assert f"the new one is {tmp_path / '.m.lowvram-chat-new'}" in told
    assert (out / "mine.txt").read_text() == "kept"
    assert (tmp_path / ".m.lowvram-chat-new" / "model.safetensors").is_file()  # proved, so it is not thrown away


def test_what_an_interrupted_merge_left_is_not_mixed_with_a_new_one(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".m.lowvram-chat-new"
    left.mkdir()
    (left / "model-00002-of-00002.safetensors").write_text("old")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as locked:
        locked.setattr(shutil, "rmtree", refuse)
        with pytest.raises(UsageError, match="left by an interrupted command, and cannot be deleted"):
            api.merge(lora_run, out=tmp_path / "m")
    api.merge(lora_run, out=tmp_path / "m")
    assert not list((tmp_path / "m").glob("model-*"))


def test_the_reloaded_model_is_freed_before_its_files_are_moved(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloaded: list[weakref.ref[object]] = []
    load = AutoModelForCausalLM.from_pretrained

    def remembered(*args: Any, **kwargs: Any) -> object:
        model = load(*args, **kwargs)
        reloaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(merging, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=remembered))
    alive: list[object] = []
    monkeypatch.setattr(merging, "replace_folder", lambda *_: alive.extend(model() for model in reloaded))
    api.merge(lora_run, out=tmp_path / "m")
    assert alive == [None]


def test_a_full_run_has_nothing_to_merge(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main([str(full_run)]) == 2
    assert "already a complete model" in capsys.readouterr().err


def test_a_base_of_another_shape_is_refused(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny_gpt2(tmp_path / "other", width=32)
    assert merge.main([str(lora_run), "--base", str(other), "--out", str(tmp_path / "m")]) == 2
    printed = capsys.readouterr().err
    assert "was trained on another base model" in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("m*"))


def test_a_base_of_fewer_layers_is_refused(lora_run: Path, tmp_path: Path) -> None:
    other = save_tiny_gpt2(tmp_path / "other", layers=1)
    assert merge.main([str(lora_run), "--base", str(other), "--out", str(tmp_path / "m")]) == 2
    assert not list(tmp_path.glob("m*"))


def test_a_merge_that_is_another_function_is_refused_and_leaves_nothing(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    def forget(self: PeftModel) -> Any:
        return self.unload()

    monkeypatch.setattr(PeftModel, "merge_and_unload", forget, raising=False)
    assert merge.main([str(lora_run), "--out", str(tmp_path / "m")]) == 1
    assert "not the same function" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*"))


def test_a_save_that_loses_weights_is_refused(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2LMHeadModel

    original = GPT2LMHeadModel.save_pretrained

    def save(self: Any, folder: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.transformer.h[0].mlp.c_fc.weight *= 2
        original(self, folder, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save)
    with pytest.raises(ProofError, match="after reloading"):
        api.merge(lora_run, out=tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_numbers_that_are_not_numbers_prove_nothing() -> None:
    assert not Proof(float("nan"), 0.0, 1.0).holds(exact=True)
    assert not Proof(0.0, float("nan"), 1.0).holds(exact=True)
    assert Proof(0.0, 1e-6, 1.0).holds(exact=True)


def test_a_run_moved_elsewhere_still_merges(lora_run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(lora_run, moved)
    assert api.merge(moved).path == moved / "merged"
