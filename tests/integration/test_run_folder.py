"""The run folder: what stands in it, and that nothing is ever written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.sft import main
from tests.runs import Bench, metrics, result


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_full_run_leaves_what_later_commands_need(full_run: Path) -> None:
    assert names(full_run) == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "checkpoints",
        "model",
    }
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names(
        full_run / "model"
    )


def test_an_adapter_run_leaves_an_adapter_and_no_model(lora_run: Path) -> None:
    assert "model" not in names(lora_run)
    wanted = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert wanted <= names(lora_run / "adapter")
    assert "model.safetensors" not in names(lora_run / "adapter")


def test_nothing_half_written_is_left(full_run: Path, lora_run: Path) -> None:
    for run in (full_run, lora_run):
        assert not [path for path in run.rglob("*") if "partial" in path.name or path.name == "before.json"]


def test_the_recipe_in_the_folder_is_the_resolved_one(full_run: Path, session_bench: Bench) -> None:
    recipe = load_recipe(full_run / "recipe.yaml")
    assert recipe == session_bench.recipe("full", train__save_steps=5, train__eval_steps=5)
    assert set(yaml.safe_load((full_run / "recipe.yaml").read_text(encoding="utf-8"))["train"]) == set(
        type(recipe.train).model_fields
    )


def test_the_environment_names_versions_and_machine_and_nobody(full_run: Path) -> None:
    text = (full_run / "environment.json").read_text(encoding="utf-8")
    said = json.loads(text)
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= set(said["libraries"])
    assert {"lowvram_chat", "python", "platform", "device", "threads"} <= set(said)
    assert str(Path.home()) not in text


def test_a_metrics_line_has_loss_rate_norm_tokens_and_memory(full_run: Path) -> None:
    lines = [line for line in metrics(full_run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert {
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "real_tokens_per_second",
            "padded_tokens_per_second",
        } <= set(line)
        assert any(name.startswith("peak_") and name.endswith("_bytes") for name in line)
        assert 0 < line["real_tokens_per_second"] <= line["padded_tokens_per_second"]
    assert [line["step"] for line in metrics(full_run) if "eval_loss" in line] == [5, 10, 12]


def test_the_result_says_what_the_run_came_to(full_run: Path) -> None:
    said = result(full_run)
    assert said["held_out_loss_after"] < said["held_out_loss_before"]
    assert said["steps"] == 12
    assert 0 < said["real_tokens"] < said["padded_tokens"]
    assert said["seconds"] > 0
    assert any(name.startswith("peak_") for name in said)
    assert said["data"]["conversations"] == 64
    assert Path(said["model"]).is_dir()


def test_tokens_per_second_add_up_to_the_tokens_of_the_run(full_run: Path) -> None:
    lines = [line for line in metrics(full_run) if "loss" in line]
    share = [line["real_tokens_per_second"] / line["padded_tokens_per_second"] for line in lines]
    assert min(share) < 1
    assert result(full_run)["real_tokens"] <= 12 * 4 * 64


def test_the_last_logged_loss_is_the_training_loss_of_the_result(full_run: Path) -> None:
    assert result(full_run)["training_loss"] == [line["loss"] for line in metrics(full_run) if "loss" in line][-1]


def test_checkpoints_are_kept_up_to_the_limit(full_run: Path, bench: Bench) -> None:
    assert names(full_run / "checkpoints") == {"checkpoint-10", "checkpoint-12"}
    run = bench.run("r", train__save_steps=2, train__save_total_limit=1, train__max_steps=6)
    assert names(run / "checkpoints") == {"checkpoint-6"}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_card_is_filled_in(kind: str, full_run: Path, lora_run: Path) -> None:
    folder = full_run / "model" if kind == "full" else lora_run / "adapter"
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == ("transformers" if kind == "full" else "peft")
    assert metadata["pipeline_tag"] == "text-generation"
    assert "held-out loss after" in body
    assert "THIS_FOLDER" in body
    assert "learning_rate" in body
    assert "[More Information Needed]" not in card


def test_an_earlier_run_is_not_overwritten(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(bench.file("r", train__max_steps=2, train__save_steps=2))
    assert main([recipe]) == 0
    before = (bench.folder / "r" / "result.json").read_bytes()
    capsys.readouterr()
    assert main([recipe]) == 2
    printed = capsys.readouterr().err
    assert "--overwrite" in printed
    assert "--resume" in printed
    assert (bench.folder / "r" / "result.json").read_bytes() == before


def test_overwrite_replaces_the_whole_run(bench: Bench) -> None:
    recipe = str(bench.file("r", train__max_steps=4, train__save_steps=2))
    assert main([recipe]) == 0
    (bench.folder / "r" / "merged").mkdir()
    assert main([recipe, "--overwrite", "train.save_steps=null", "train.max_steps=1"]) == 0
    run = bench.folder / "r"
    assert "merged" not in names(run)
    assert not list(run.glob("checkpoints/*"))
    assert [line["step"] for line in metrics(run)] == [1]


def test_a_run_that_cannot_start_leaves_the_earlier_one_alone(bench: Bench) -> None:
    recipe = str(bench.file("r", train__max_steps=1))
    assert main([recipe]) == 0
    before = result(bench.folder / "r")
    assert main([recipe, "--overwrite", "data.source=missing.jsonl"]) == 2
    assert result(bench.folder / "r") == before


def test_a_folder_that_is_no_run_is_left_alone(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    mine = bench.folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert main([str(bench.file("r")), f"output.dir={mine}", "--overwrite"]) == 2
    assert names(mine) == {"thesis.txt"}
    assert "left alone" in capsys.readouterr().err


def test_a_folder_with_a_recipe_of_mine_is_no_run_either(bench: Bench) -> None:
    mine = bench.folder / "mine"
    mine.mkdir()
    shutil.copy(bench.file("r"), mine / "recipe.yaml")
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert main([str(mine / "recipe.yaml"), f"output.dir={mine}", "--overwrite", "--max-steps", "1"]) == 2
    assert names(mine) == {"thesis.txt", "recipe.yaml"}


def test_an_empty_folder_may_be_used(bench: Bench) -> None:
    (bench.folder / "r").mkdir()
    assert main([str(bench.file("r", train__max_steps=1))]) == 0


def test_max_steps_cuts_the_run_short(bench: Bench) -> None:
    assert main([str(bench.file("r")), "--max-steps", "3"]) == 0
    assert result(bench.folder / "r")["steps"] == 3
    assert load_recipe(bench.folder / "r" / "recipe.yaml").train.max_steps == 3


def test_print_recipe_shows_everything_and_writes_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.file("r")
    assert main([str(path), "train.learning_rate=3e-5", "--print-recipe"]) == 0
    shown = bench.folder / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(shown) == load_recipe(path, ["train.learning_rate=3e-5"])
    assert not (bench.folder / "r").exists()


def test_json_is_the_last_line_and_equals_the_result(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bench.file("r")), "--max-steps", "1", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result(bench.folder / "r")
    assert any("held-out loss" in line for line in printed[:-1])
    assert any("next:" in line for line in printed[:-1])


def test_tensorboard_is_told_where_asked_and_refused_beforehand_where_missing(bench: Bench) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        assert main([str(bench.file("r")), "output.report_to=[tensorboard]"]) == 2
        assert not (bench.folder / "r").exists()
    else:
        assert main([str(bench.file("r")), "output.report_to=[tensorboard]", "--max-steps", "1"]) == 0
        assert list((bench.folder / "r").rglob("events.out.tfevents*"))


def test_a_run_without_held_out_conversations_is_not_sent_to_evaluate(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bench.file("r", train__max_steps=1))]) == 0
    assert f"next: python -m lowvram_chat.evaluate {bench.folder / 'r'}" in capsys.readouterr().out
    assert main([str(bench.file("without", train__max_steps=1, data__eval_source=None))]) == 0
    printed = capsys.readouterr().out
    assert f"next: python -m lowvram_chat.chat {bench.folder / 'without'}" in printed
    assert "lowvram_chat.evaluate" not in printed


def test_the_home_folder_is_expanded_everywhere(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings = {"train__save_steps": 2, "output": {"dir": "~/run", "sample_prompts": []}}
    assert main([str(bench.file("r", train__max_steps=2, **settings))]) == 0
    assert {"recipe.yaml", "checkpoints", "model"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert main([str(bench.file("r", train__max_steps=3, **settings)), "--resume"]) == 0
    assert result(tmp_path / "run")["steps"] == 3


def test_resuming_a_finished_run_with_another_setting_changes_nothing(bench: Bench) -> None:
    assert main([str(bench.file("r", train__max_steps=2, train__save_steps=2))]) == 0
    before = (bench.folder / "r" / "recipe.yaml").read_text(encoding="utf-8")
    file = bench.file("r", train__max_steps=2, train__save_steps=2, train__warmup_ratio=0.5)
    assert main([str(file), "--resume"]) == 0
    assert (bench.folder / "r" / "recipe.yaml").read_text(encoding="utf-8") == before
