"""A model that does not exist or cannot be used is refused with a message that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from lowvram_chat.errors import DeviceError, ModelError, NotFoundError
from lowvram_chat.model.adapters import add_adapter, linear_layers
from lowvram_chat.model.configs import config_for
from lowvram_chat.model.device import bf16_slowdown, check_device
from lowvram_chat.model.pretrained import check_positions, load_config, load_model, load_tokenizer
from lowvram_chat.recipe.schema import Adapter, Model, Recipe


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:tiny-gpt3", "Did you mean 'builtin:tiny-gpt2'"),
        ("./nosuch", "there is no such folder"),
        ("/nosuch/model", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("nosuch-owner/nosuch-model", "HF_HUB_OFFLINE"),
        ("nosuch", "HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_with_its_name(name: str, words: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        load_config(name)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_folder_without_a_model_is_refused_with_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        load_config(str(tmp_path))
    with pytest.raises(NotFoundError, match=r"no tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_local_folder_wins_over_a_known_model_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_for(Model(name="gpt2")).n_layer == 12
    GPT2Config(n_layer=3, n_embd=96, n_head=4).save_pretrained("gpt2")
    config = config_for(Model(name="gpt2"))
    assert (config.n_layer, config.n_embd) == (3, 96)


def test_pickled_weights_are_not_loaded(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModelForCausalLM.from_pretrained(tiny).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_model(Model(name=str(tmp_path)))


def test_damaged_weights_are_refused_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match=str(tmp_path.name)):
        load_model(Model(name=str(tmp_path)))


def test_a_damaged_config_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises((ModelError, NotFoundError), match=str(tmp_path.name)):
        load_config(str(tmp_path))


def test_weights_that_do_not_fit_the_config_are_refused_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8")) | {"n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=str(tmp_path.name)):
        load_model(Model(name=str(tmp_path)))


@pytest.mark.parametrize("config", [{"model_type": "nosuch"}, {"model_type": "t5"}, {}])
def test_a_model_that_is_no_causal_language_model_is_refused(config: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=str(tmp_path.name)):
        load_model(Model(name=str(tmp_path)))


def test_remote_code_is_never_run(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nraise SystemExit(99)\n", encoding="utf-8")
    with pytest.raises(ModelError):
        load_model(Model(name=str(tmp_path)))


def test_rows_longer_than_the_models_positions_are_refused_with_the_override(tiny: Path) -> None:
    check_positions(load_config(str(tiny)), 256, "tiny")
    with pytest.raises(ModelError, match=r"Set data\.max_length=256"):
        check_positions(load_config(str(tiny)), 257, "tiny")


def test_adapters_go_on_every_linear_layer_of_the_blocks(tiny: Path) -> None:
    assert linear_layers(load_model(Model(name=str(tiny)))) == ["c_attn", "c_proj", "c_fc"]


def test_only_the_adapter_trains_and_in_float32(tiny: Path) -> None:
    model = add_adapter(load_model(Model(name=str(tiny), dtype="float16")), Adapter())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_an_unknown_target_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean 'c_attn'"):
        add_adapter(load_model(Model(name=str(tiny))), Adapter(target_modules=["c_atn"]))


def test_fp16_on_a_cpu_is_refused_with_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"train\.precision=fp32"):
        check_device(Recipe())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_other_precisions_run_on_a_cpu(precision: str) -> None:
    recipe = Recipe.model_validate({"train": {"precision": precision}})
    assert check_device(recipe).type in ("cpu", "cuda")


@pytest.mark.parametrize(("slowdown", "warned"), [(45.2, True), (1.1, False)])
def test_bf16_that_a_cpu_emulates_gets_a_warning(
    slowdown: float, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lowvram_chat.model.device.bf16_slowdown", lambda: slowdown)
    check_device(Recipe.model_validate({"train": {"precision": "bf16"}}))
    assert ("45 times as long for bf16 as for fp32. Add train.precision=fp32." in caplog.text) is warned


def test_bf16_is_compared_with_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: [9.0, 4.0, 5.0], torch.float32: [1.0, 0.5, 3.0]}
    monkeypatch.setattr("timeit.repeat", lambda product, **_: seconds[product().dtype])
    assert bf16_slowdown() == 8


def test_flash_attention_without_its_package_is_refused() -> None:
    recipe = Recipe.model_validate({"train": {"precision": "bf16"}, "model": {"attention": "flash_attention_2"}})
    with pytest.raises(DeviceError, match=r"model\.attention=sdpa"):
        check_device(recipe)
