"""A model is loaded whole or refused: no weight is made up, left out or infinite, and no token is without an embedding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowvram_chat import chat, evaluate, merge, sft
from lowvram_chat.errors import ModelError
from lowvram_chat.model.pretrained import load_model, load_tokenizer
from lowvram_chat.recipe.schema import Model
from tests.runs import Bench

Weights = dict[str, torch.Tensor]
NAME = "transformer.h.0.mlp.c_fc.weight"


def renamed(weights: Weights) -> Weights:
    return {f"other.{name}": value for name, value in weights.items()}


def without_one(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != NAME}


def with_one_more(weights: Weights) -> Weights:
    return {**weights, "transformer.h.0.extra.weight": torch.zeros(2)}


def with_old_buffers(weights: Weights) -> Weights:
    return {
        **weights,
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
    }


def infinite(weights: Weights) -> Weights:
    weights[NAME][0, 0] = float("inf")
    return weights


def change(source: Path, target: Path, edit: Callable[[Weights], Weights], file: str = "model.safetensors") -> Path:
    """Copy a model folder with other weights."""
    shutil.copytree(source, target)
    save_file(edit(load_file(source / file)), target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (renamed, "are missing, so random values would take their place"),
        (without_one, f"{NAME} is missing"),
        (with_one_more, "transformer.h.0.extra.weight is unknown to this kind of model"),
        (infinite, f"the weight {NAME} holds values that are not finite"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    edit: Callable[[Weights], Weights], words: str, tiny: Path, tmp_path: Path
) -> None:
    folder = change(tiny, tmp_path / "model", edit)
    with pytest.raises(ModelError) as caught:
        load_model(Model(name=str(folder)))
    assert words in str(caught.value)


def test_buffers_of_older_files_are_no_weights(tiny: Path, tmp_path: Path) -> None:
    load_model(Model(name=str(change(tiny, tmp_path / "model", with_old_buffers))))


def test_a_large_sum_is_finite_where_every_weight_is(tiny: Path, tmp_path: Path) -> None:
    def large(weights: Weights) -> Weights:
        weights[NAME].fill_(3e38)
        return weights

    load_model(Model(name=str(change(tiny, tmp_path / "model", large))))


def test_an_adapter_with_half_its_tensors_is_refused_by_merge(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(list(weights.items())[::2]), file, metadata={"format": "pt"})
    assert merge.main([str(run)]) == 2
    assert "are missing" in capsys.readouterr().err
    assert not (run / "merged").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_anything_is_written(
    bench: Bench, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench.folder / "model"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    assert sft.main([str(bench.file("r", model__name=str(folder)))]) == 2
    assert "the tokenizer makes tokens up to 8192, but the model has embeddings for 8192" in capsys.readouterr().err
    assert not (bench.folder / "r").exists()


def test_a_folder_without_a_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="this folder has no vocabulary"):
        load_tokenizer(str(folder))


def test_a_head_of_its_own_under_tied_embeddings_is_refused(tiny: Path, tmp_path: Path) -> None:
    def own_head(weights: Weights) -> Weights:
        return {**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}

    with pytest.raises(ModelError, match="ties the head to the embeddings"):
        load_model(Model(name=str(change(tiny, tmp_path / "model", own_head))))


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("config.json", {"vocab_size": "many"}, "AutoConfig cannot load it"),
        ("config.json", {"layer_norm_epsilon": None}, "AutoConfig cannot load it"),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantised already"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id in generation_config.json is '</s>'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    file: str, settings: dict[str, object], words: str, bench: Bench, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench.folder / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(config | settings), encoding="utf-8")
    assert sft.main([str(bench.file("r", model__name=str(folder)))]) == 2
    assert words in capsys.readouterr().err
    assert not (bench.folder / "r").exists()


def test_a_revision_of_a_folder_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision: main, but .* is a folder"):
        load_model(Model(name=str(tiny), revision="main"))


def edit_config(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}), encoding="utf-8")


def write_nan(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def cut_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def write_list(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit_config, "adapter_config.json has changed since the adapter was saved"),
        (write_nan, "holds values that are not finite"),
        (cut_weights, "damaged"),
        (write_list, "adapter_config.json is damaged"),
    ],
)
@pytest.mark.parametrize("command", [merge, evaluate, chat])
def test_a_damaged_adapter_is_refused_by_every_command(
    damage: Callable[[Path], None],
    words: str,
    command: Any,
    lora_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    damage(run / "adapter")
    assert command.main([str(run), *(["--prompt", "Hi"] if command is chat else [])]) == 2
    assert words in capsys.readouterr().err


def test_a_merge_that_overflows_is_not_kept(bench: Bench, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def large(weights: Weights) -> Weights:
        weights["transformer.wpe.weight"] *= 4e6
        return weights

    base = change(tiny, bench.folder / "base", large)
    run = bench.run("r", model__name=str(base), adapter={"kind": "lora", "r": 4}, train__max_steps=1)
    assert merge.main([str(run), "--dtype", "float16"]) == 1
    assert not (run / "merged").exists()


def test_a_trained_model_is_no_earlier_merge(
    full_run: Path, lora_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge.main([str(lora_run), "--out", str(full_run / "model"), "--overwrite"]) == 2
    assert "is not an earlier merge" in capsys.readouterr().err


def test_a_run_on_a_relative_base_is_opened_from_another_directory(
    bench: Bench, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    run = bench.run("r", model__name=tiny.name, adapter={"kind": "lora", "r": 4}, train__max_steps=1)
    monkeypatch.chdir(tmp_path)
    assert chat.main([str(run), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert evaluate.main([str(run)]) == 0
    assert merge.main([str(run)]) == 0
