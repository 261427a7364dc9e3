"""A model is loaded whole or refused: no weight is made up, left out or infinite, and no token is without an embedding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowvram_chat import merge, sft
from lowvram_chat.errors import ModelError
from lowvram_chat.model.pretrained import load_model
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
