"""Predicted speeds: held against published ones, and ordered as the work behind them is."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.validation.csv_rows import read_rows
from benchmarks.validation.published_runs import LADDER
from benchmarks.validation.speed import compare, largest_error, median_error, table
from benchmarks.validation.speed_file import predict_speed as predicted_row
from benchmarks.validation.speed_file import summarise
from benchmarks.validation.speed_rows import REQUIRED_COLUMNS
from lowvram_chat.gpus import GPUS
from lowvram_chat.planning.prediction import make_plan
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.results.baseline import BASELINE_SECONDS, BASELINE_TOKENS
from lowvram_chat.timing.speed import Speed, predict_speed, speeds_by_power_limit
from lowvram_chat.timing.whole_run import steps_of
from tests.samples import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


def seconds_of_the_baseline_s_work(predicted: Speed) -> float:
    """Return the predicted time of the published baseline's three epochs."""
    return 3 * BASELINE_TOKENS / predicted.tokens_per_second


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2 small with two layers and a small vocabulary: large enough to keep a card busy."""
    folder = tmp_path_factory.mktemp("wide")
    config = {"model_type": "gpt2", "n_layer": 2, "vocab_size": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def recipe(folder: str, **sections: Any) -> Recipe:
    tree: dict[str, Any] = {"data": {"max_length": 256}, "train": {}, "optimizer": {"name": "adamw"}, **sections}
    tree["model"] = {"name": folder, "dropout": 0.0, **tree.get("model", {})}
    tree["train"] = {"per_device_train_batch_size": 16, **tree["train"]}
    return Recipe.model_validate(tree)


def speed(folder: str, *, compiled: bool = False, fp16_accumulation: bool = False, **sections: Any) -> Speed:
    asked = recipe(folder, **sections)
    return predict_speed(
        asked, make_plan(asked).work, compiled=compiled, fp16_accumulation=fp16_accumulation, system="linux"
    )


def test_the_published_speeds_are_met_within_the_error_that_is_claimed() -> None:
    rows = compare()
    assert median_error(rows) <= 0.045
    assert largest_error(rows) <= 0.15
    assert table(rows).row_count == len(rows) == 13


def test_nine_in_ten_of_the_other_published_speeds_are_met_and_in_the_range() -> None:
    rows = read_rows(ROOT / "benchmarks" / "data" / "speeds_measured.csv", REQUIRED_COLUMNS)
    report = summarise([predicted_row(row) for row in rows])
    assert report.predicted_rows == 36
    assert report.median_error_percent is not None
    assert report.median_error_percent <= 8
    assert report.rows_within_20_percent >= 33
    assert report.rows_in_range >= 33


def test_each_step_of_the_ladder_is_predicted_faster_than_the_one_before() -> None:
    predicted = [row.predicted_ms for row in compare(LADDER)]
    assert predicted == sorted(predicted, reverse=True)
    assert len(set(predicted)) == len(predicted)


def test_a_prediction_outside_a_published_range_is_an_error_from_its_nearer_end() -> None:
    (row,) = compare(LADDER[:1])
    assert row.error == pytest.approx(row.predicted_ms / 1000 - 1)
    inside = type(row)(published=type(row.published)(**{**vars(row.published), "at_most": 2000.0}), predicted_ms=1500)
    outside = type(row)(published=inside.published, predicted_ms=3000)
    assert (inside.error, outside.error) == (0, 0.5)


@cache
def shipped(name: str) -> tuple[Recipe, Any]:
    loaded = load_recipe(Path(ROOT) / "recipes" / f"{name}.yaml")
    return loaded, make_plan(loaded).work


def test_the_baseline_s_recipe_is_predicted_to_take_what_the_baseline_took() -> None:
    predicted = predict_speed(*shipped("baseline_7h27m"), watts=80, system="windows")
    assert seconds_of_the_baseline_s_work(predicted) == pytest.approx(BASELINE_SECONDS, rel=0.05)
    assert predicted.tokens_per_step == 2048


def test_the_fast_recipe_does_the_baseline_s_work_sooner() -> None:
    (slow, _), (fast, operations) = shipped("baseline_7h27m"), shipped("fast_fp16")
    assert fast.data == slow.data.model_copy(update={"attention_mask": False})
    kept = {"num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "precision"}
    assert fast.train.model_dump(include=kept) == slow.train.model_dump(include=kept)
    eager = predict_speed(fast, operations, watts=80, compiled=False)
    compiled = predict_speed(fast, operations, watts=80, compiled=True)
    assert eager.tokens_per_step == 2048
    assert seconds_of_the_baseline_s_work(eager) < 3.75 * 3600
    assert seconds_of_the_baseline_s_work(compiled) < 3.25 * 3600
    assert seconds_of_the_baseline_s_work(compiled) < seconds_of_the_baseline_s_work(eager)
    assert seconds_of_the_baseline_s_work(compiled) * compiled.utilisation == pytest.approx(87 * 60, rel=0.01)


def test_every_power_limit_of_a_card_has_its_speed_and_less_power_is_slower() -> None:
    predicted = speeds_by_power_limit(*shipped("fast_fp16"))
    assert [one.watts for one in predicted] == [80, 55, 50, 40]
    seconds = [one.seconds_per_step for one in predicted]
    assert seconds == sorted(seconds)
    assert predict_speed(*shipped("fast_fp16")).watts == 80
    assert predict_speed(*shipped("fast_fp16"), gpu="t4-16gb").seconds_per_step < seconds[0]


def test_a_speed_s_figures_agree_with_each_other() -> None:
    one = predict_speed(*shipped("fast_fp16"))
    assert one.tokens_per_second * one.seconds_per_step == pytest.approx(one.tokens_per_step)
    assert pytest.approx(16_002 * one.seconds_per_step) == BASELINE_TOKENS / one.tokens_per_second
    assert 0 < one.utilisation < 1
    peak = max(GPUS["rtx-3050-laptop-4gb"].fp16_tflops.values()) * 1e12
    assert one.utilisation == pytest.approx(one.flops_per_step / one.seconds_per_step / peak, rel=0.001)
    assert one.flops_per_step / one.tokens_per_step == pytest.approx(755e6, rel=0.01)


def test_less_work_is_predicted_faster(wide: str) -> None:
    plain = speed(wide)
    assert speed(wide, adapter={"kind": "lora"}).flops_per_step < 0.75 * plain.flops_per_step
    assert speed(wide, adapter={"kind": "lora"}).seconds_per_step < plain.seconds_per_step
    assert speed(wide, model={"fused_gelu": False}).seconds_per_step > plain.seconds_per_step
    assert speed(wide, model={"attention": "eager"}).seconds_per_step > plain.seconds_per_step
    assert speed(wide, optimizer={"name": "adamw_unfused"}).seconds_per_step > plain.seconds_per_step
    assert speed(wide, optimizer={"name": "adamw_8bit"}).seconds_per_step < plain.seconds_per_step
    assert speed(wide, train={"precision": "fp32"}).seconds_per_step > plain.seconds_per_step


def test_checkpointing_does_the_forward_pass_of_the_blocks_twice_but_for_each_one_s_last_product(wide: str) -> None:
    plain, twice = speed(wide), speed(wide, train={"gradient_checkpointing": True})
    tokens = plain.tokens_per_step
    assert twice.flops_per_step - plain.flops_per_step == pytest.approx(
        tokens * 2 * (16 * 768**2 + 4 * 256 * 768), rel=0.01
    )
    assert twice.seconds_per_step > plain.seconds_per_step


def test_the_same_rows_in_more_micro_batches_take_longer(wide: str) -> None:
    def cut(rows: int) -> Speed:
        return speed(wide, train={"per_device_train_batch_size": rows, "gradient_accumulation_steps": 16 // rows})

    whole, half, quarter = cut(16), cut(8), cut(4)
    assert whole.seconds_per_step < half.seconds_per_step < quarter.seconds_per_step
    assert quarter.flops_per_step == pytest.approx(whole.flops_per_step, rel=0.001)
    assert quarter.launches_per_step > 2 * whole.launches_per_step


def test_compiling_and_accumulating_in_fp16_are_faster(wide: str) -> None:
    plain = speed(wide)
    compiled = speed(wide, compiled=True)
    assert compiled.seconds_per_step < plain.seconds_per_step
    assert compiled.launches_per_step < plain.launches_per_step
    assert compiled.flops_per_step == plain.flops_per_step
    doubled = speed(wide, fp16_accumulation=True)
    assert doubled.physical_limit_seconds_per_step == pytest.approx(plain.physical_limit_seconds_per_step / 2)
    assert doubled.seconds_per_step < plain.seconds_per_step


def test_a_4_bit_base_has_the_products_of_any_lora_and_moves_more(wide: str) -> None:
    lora = speed(wide, adapter={"kind": "lora"}, model={"dtype": "float16"})
    four_bit = speed(wide, adapter={"kind": "lora"}, model={"dtype": "float16", "load_in": "4bit"})
    assert four_bit.flops_per_step == pytest.approx(lora.flops_per_step, rel=0.001)
    assert four_bit.seconds_per_step > lora.seconds_per_step


def test_the_steps_of_a_run_are_known_where_its_rows_are(tmp_path: Path) -> None:
    def steps(**data: Any) -> int | None:
        tree = {"data": data, "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}}
        return steps_of(Recipe.model_validate(tree))

    ultrachat = {"source": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}
    assert steps(**ultrachat) == math.ceil(207_865 / 16)
    assert steps(**ultrachat, limit=1600) == 100
    assert steps(**ultrachat, limit=1600, eval_fraction=0.5) == 50
    assert steps(**ultrachat, rows="packed") is None
    assert steps(source="someone/else") is None
    file = tmp_path / "chats.jsonl"
    file.write_text("{}\n\n{}\n" * 20)
    assert steps(source=str(file)) == 3
    assert steps(source=str(file), eval_fraction=0.199) == 2  # 8 of 40 are held out, as a run does
    assert steps(source=str(file), overflow="split") is None
    assert steps(source=[str(file), "HuggingFaceH4/ultrachat_200k"], split="test_sft") == math.ceil((40 + 23_110) / 16)
