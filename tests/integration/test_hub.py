"""The shipped recipes run with their real model and data names from a prepared hub cache, without a network."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from lowvram_chat import sft
from tests.runs import Bench, result
from tests.samples import ROOT, conversations, save_tiny_gpt2

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
SPLITS = {"train_sft": 40, "test_sft": 8, "train_gen": 40, "test_gen": 8}


def prepare_model(cache: Path, name: str) -> Path:
    """Save a tiny GPT-2 where huggingface_hub caches `name`: refs/main names a commit, snapshots/COMMIT has the files."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    save_tiny_gpt2(folder / "snapshots" / COMMIT, positions=1024)
    return folder


def prepare_dataset(cache: Path, name: str) -> Path:
    """Write small splits where `datasets` caches the Arrow files of `name`: owner___name/config/version/hash."""
    owner, _, short = name.partition("/")
    folder = cache / f"{owner}___{short}" / "default" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    message = {"content": {"dtype": "string", "_type": "Value"}, "role": {"dtype": "string", "_type": "Value"}}
    text = {"dtype": "string", "_type": "Value"}
    features = {"prompt": text, "prompt_id": text, "messages": {"feature": message, "_type": "List"}}
    splits = {}
    for number, (split, rows) in enumerate(SPLITS.items()):
        table = pyarrow.Table.from_pylist([ultrachat_row(row) for row in conversations(rows, seed=number)])
        path = str(folder / f"{short}-{split}.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        splits[split] = {"name": split, "num_examples": rows, "dataset_name": short}
    info = {
        "builder_name": "parquet",
        "dataset_name": short,
        "config_name": "default",
        "version": {"version_str": "0.0.0"},
    }
    (folder / "dataset_info.json").write_text(
        json.dumps(info | {"features": features, "splits": splits}), encoding="utf-8"
    )
    return cache / f"{owner}___{short}"


def ultrachat_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the columns of ultrachat_200k."""
    messages = [{"content": message["content"], "role": message["role"]} for message in row["messages"]]
    return {"prompt": messages[0]["content"], "prompt_id": "0", "messages": messages}


@pytest.fixture(scope="module", autouse=True)
def hub_cache() -> Iterator[None]:
    """Prepare a model and a dataset with their real names in the caches of this session."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    prepared = [
        prepare_model(Path(HF_HUB_CACHE), "openai-community/gpt2"),
        prepare_dataset(Path(datasets.config.HF_DATASETS_CACHE), "HuggingFaceH4/ultrachat_200k"),
    ]
    yield
    for folder in prepared:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["full_fp16", "full_fp16_adamw", "lora_fp16", "qlora_nf4", "baseline_7h27m"])
def test_a_hub_recipe_runs_offline_from_the_cache(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    words = [str(ROOT / "recipes" / f"{name}.yaml"), "train.precision=fp32", "--max-steps", "2", f"output.dir={run}"]
    # --force: the run is on a CPU in fp32, not on the card of the recipe
    assert sft.main([*words, "--force"]) == 0
    outcome = result(run)
    assert outcome["steps"] == 2
    assert outcome["data"]["conversations"] == 40
    assert (outcome["held_out_loss_before"] is None) == (name == "baseline_7h27m")
    if "adapter" in outcome:
        config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "openai-community/gpt2"
    card = (run / ("adapter" if "adapter" in outcome else "model") / "README.md").read_text(encoding="utf-8")
    assert "base_model: openai-community/gpt2" in card
    assert "- HuggingFaceH4/ultrachat_200k" in card


def test_an_unknown_split_names_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "full_fp16.yaml")
    words = [recipe, "train.precision=fp32", "data.split=train_stf", f"output.dir={tmp_path / 'r'}"]
    assert sft.main(words) == 2
    printed = capsys.readouterr().err
    assert "data.split" in printed
    assert "train_sft" in printed
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("setting", ["model.name=openai-community/gpt2-nosuch", "data.source=HuggingFaceH4/nosuch"])
def test_a_name_that_is_not_in_the_cache_is_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes" / "full_fp16.yaml")
    assert sft.main([recipe, "train.precision=fp32", setting, f"output.dir={tmp_path / 'r'}"]) == 2
    printed = capsys.readouterr().err
    assert f"{setting.partition('=')[2]}: no local" in printed
    assert "the hub is switched off (HF_HUB_OFFLINE)" in printed
    assert not (tmp_path / "r").exists()


def test_a_hub_that_does_not_answer_is_not_reported_as_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_chat import hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub, "_found_unreachable", False)
    hub.work_offline_if_unreachable()
    assert "the hub could not be reached" in hub.explain("model", "a/b", OSError())


@pytest.mark.parametrize(
    ("name", "remote"),
    [("owner/name", True), ("gpt2", True), ("nosuch.jsonl", False), ("./nosuch", False), ("D:\\chats", False)],
)
def test_what_can_only_be_local_does_not_ask_for_the_hub(name: str, remote: bool) -> None:
    from lowvram_chat.data.sources import is_remote

    assert is_remote(name) is remote


def test_a_hub_merge_finds_its_base_again(tmp_path: Path) -> None:
    from lowvram_chat import merge

    run = tmp_path / "lora"
    recipe = str(ROOT / "recipes" / "lora_fp16.yaml")
    assert sft.main([recipe, "train.precision=fp32", "--max-steps", "2", f"output.dir={run}"]) == 0
    assert merge.main([str(run)]) == 0
    assert (run / "merged" / "config.json").is_file()


@pytest.mark.parametrize("pattern", ["train.jsonl", "tr*.jsonl"])
def test_local_files_and_globs_do_not_ask_for_the_hub(
    pattern: str, bench: Bench, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram_chat import hub

    requests: list[bool] = []
    monkeypatch.setattr(hub, "work_offline_if_unreachable", lambda: requests.append(True))
    bench.run("r", data__source=str(train_file.parent / pattern), train__max_steps=1)
    assert not requests


@pytest.mark.network
def test_the_hub_has_the_model_that_the_recipes_name() -> None:
    from huggingface_hub import HfApi

    assert HfApi().model_info("openai-community/gpt2").id == "openai-community/gpt2"
