"""A plan adds up, gives the same verdict as the allocator, and its changes are settings that fit."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from lowvram_chat import plan as command
from lowvram_chat.model.configs import KNOWN_CONFIGS, config_for
from lowvram_chat.planning import search
from lowvram_chat.planning.changes import Change, apply_change, as_overrides
from lowvram_chat.planning.prediction import card_rules, longest_rows_run, make_plan
from lowvram_chat.planning.replay import replay
from lowvram_chat.planning.runs import traced_steps
from lowvram_chat.planning.schedule import Lifetimes, Segment, compose_run
from lowvram_chat.planning.search import advise, fastest, largest_micro_batch
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.timing.planner import PLANNER
from lowvram_chat.tracing import optimizer as recipe_optimizer
from lowvram_chat.tracing.recorder import Storage
from lowvram_chat.tracing.run import trace_run
from lowvram_chat.tracing.training_loop import MicroBatchShape
from lowvram_chat.units import MIB

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(tempfile.mkdtemp(prefix="lowvram-chat-plans-"))


def gpt2(layers: int = 1, width: int = 128) -> str:
    """A GPT-2 of one layer as a folder with nothing but its configuration: all that a plan needs."""
    path = FOLDER / f"{layers}x{width}"
    path.mkdir(exist_ok=True)
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": 2, "vocab_size": 5000}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    yield
    shutil.rmtree(FOLDER)


def recipe(**sections: Any) -> Recipe:
    tree: dict[str, Any] = {"model": {"name": gpt2()}, "data": {"max_length": 256}, "train": {}, **sections}
    return Recipe.model_validate(tree)


def test_the_categories_add_up_to_what_is_on_the_card() -> None:
    planned = make_plan(recipe())
    assert sum(planned.categories.values()) == planned.on_card_bytes
    assert min(planned.categories.values()) >= 0
    assert planned.peak_allocated_bytes <= planned.peak_reserved_bytes


def test_full_fine_tuning_holds_gradients_and_states_of_the_size_of_the_weights() -> None:
    planned = make_plan(recipe(optimizer={"name": "adamw"}, train={"gradient_accumulation_steps": 2}))
    weights = planned.categories["weights"]
    assert planned.trained == planned.parameters == weights // 4
    assert planned.categories["gradients"] == pytest.approx(weights, rel=0.01)
    assert planned.categories["optimizer state"] == pytest.approx(2 * weights, rel=0.01)


def test_states_are_as_large_as_the_optimizer_makes_them() -> None:
    states = {name: make_plan(recipe(optimizer={"name": name})).categories["optimizer state"] for name in OPTIMIZERS}
    assert states["adamw"] == pytest.approx(states["adamw_unfused"], rel=0.01)
    assert states["paged_adamw_8bit"] < states["adamw_8bit"] < states["adamw"]
    assert states["lion_8bit"] < states["adamw_8bit"]
    assert states["sgd"] == 0 < states["adafactor"] < states["adamw"] / 10  # no momentum by default


def test_a_4_bit_weight_takes_half_a_byte_and_an_fp32_scale_for_every_64_values() -> None:
    weights = {
        load_in: make_plan(recipe(model={"name": gpt2(2), "load_in": load_in}, adapter={"r": 4})).categories["weights"]
        for load_in in (None, "4bit")
    }
    linear = 2 * 12 * 128**2  # the head is tied to the embedding and stays
    assert weights[None] - weights["4bit"] == pytest.approx(linear * (4 - 1 / 2 - 4 / 64), rel=0.002)


def test_8_bit_optimizers_keep_embeddings_in_32_bits_and_a_scale_for_every_256_values_on_the_card() -> None:
    asked = recipe(model={"name": gpt2(width=256)}, optimizer={"name": "adamw_8bit"})
    paged = apply_change(asked, {"optimizer.name": "paged_adamw_8bit"})
    embeddings, large, small, tiny = (5000 + 1024) * 256, 11 * 256**2, 256**2, 15 * 256
    scale = 4 / 256
    states = [make_plan(each).categories["optimizer state"] for each in (asked, paged)]
    assert states[0] == pytest.approx(2 * (4 * (embeddings + tiny) + (1 + scale) * (large + small)), rel=0.001)
    assert states[1] == pytest.approx(2 * (scale * large + (1 + scale) * small + 4 * tiny), rel=0.02)


def test_settings_that_take_no_memory_are_not_traced_again() -> None:
    once = make_plan(recipe(train={"learning_rate": 1e-4}))
    assert make_plan(recipe(train={"learning_rate": 1e-4, "logging_steps": 3}, output={"dir": "elsewhere"})) is once


@settings(max_examples=20, deadline=None)
@given(
    what=st.sampled_from(["batch", "length", "rank", "layers"]),
    one=st.integers(1, 6),
    other=st.integers(1, 6),
    adapter=st.booleans(),
)
def test_the_allocated_peak_grows_with_batch_length_rank_and_layers(
    what: str, one: int, other: int, adapter: bool
) -> None:
    low, high = (_allocated(what, number, adapter or what == "rank") for number in sorted((one, other)))
    assert low <= high


@functools.cache
def _allocated(what: str, number: int, adapter: bool) -> int:
    asked = recipe(
        model={"name": gpt2(number if what == "layers" else 1, 64)},
        adapter={"r": number if what == "rank" else 8} if adapter else None,
        data={"max_length": 24 * number if what == "length" else 64},
        train={"per_device_train_batch_size": number if what == "batch" else 2},
        optimizer={"name": "adamw"},
    )
    steps = [[MicroBatchShape(asked.data.max_length)]] * 2
    return replay(trace_run(asked, card_rules(asked), steps).events).peak_allocated_bytes


def test_a_played_run_is_the_traced_one_where_the_order_is_the_same() -> None:
    asked = recipe(train={"gradient_accumulation_steps": 2})
    traced = trace_run(asked, card_rules(asked), traced_steps(asked))
    lives = Lifetimes(traced.events)
    end, last = traced.steps[0][1], traced.steps[-1][1]
    segments = [Segment(traced.events, span, lives, steady=True) for span in traced.steps[1:]]
    before = traced.events[:end]
    played = compose_run(before, Segment(traced.events, (0, end), lives).outgoing, segments)
    plain = [(event.storage.nbytes, event.is_allocation) for event in traced.events[:last]]
    assert [(event.storage.nbytes, event.is_allocation) for event in played] == plain


def test_every_storage_of_a_played_run_is_born_once_and_dies_once() -> None:
    alive: set[Storage] = set()
    for storage, is_allocation in longest_rows_run(recipe(data={"max_length": 128, "eval_fraction": 0.1})):
        assert (storage in alive) != is_allocation
        alive.symmetric_difference_update([storage])


def test_what_is_advised_fits_and_the_cheapest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MAX_SUGGESTIONS", 2)
    monkeypatch.setattr(search, "SAFETY_MARGIN_BYTES", 0)  # too much to ask of so small a model
    rows = {"per_device_train_batch_size": 16}
    asked = recipe(train=rows, data={"max_length": 512}, optimizer={"name": "adamw"})
    tight = apply_change(asked, {"memory.limit_mib": make_plan(asked).on_card_bytes // MIB - 20})
    assert not make_plan(tight).fits
    options = advise(tight, PLANNER)
    assert options
    assert all(make_plan(apply_change(tight, option.change)).fits for option in options)
    assert [option.cost for option in options] == sorted(option.cost for option in options)


def test_the_words_of_a_change_load_as_that_change(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{name: '{gpt2()}'}}\n")
    change: Change = {"train.gradient_checkpointing": True, "optimizer.name": "adamw_8bit", "adapter.kind": "lora"}
    assert load_recipe(file, as_overrides(change).split()) == apply_change(load_recipe(file), change)


def test_the_fastest_settings_fit_and_keep_the_rows_of_a_step() -> None:
    asked = recipe(train={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    for option in fastest(asked, PLANNER):
        train = apply_change(asked, option.change).train
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 8
        assert option.plan.fits


def test_the_largest_micro_batch_fits_and_one_row_more_does_not() -> None:
    asked = recipe(memory={"limit_mib": 365})
    rows = largest_micro_batch(asked, "linux", make_plan)
    assert make_plan(apply_change(asked, {"train.per_device_train_batch_size": rows})).fits
    assert not make_plan(apply_change(asked, {"train.per_device_train_batch_size": rows + 1})).fits


@pytest.mark.parametrize("name", sorted(KNOWN_CONFIGS))
def test_known_names_need_neither_network_nor_cache(name: str) -> None:
    model = recipe(model={"name": name}).model
    assert config_for(model).vocab_size in (50257, 49152)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_is_the_one_that_the_trainer_makes(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    section = recipe(optimizer={"name": name}).optimizer
    row = OPTIMIZERS[name]
    momentum = f"momentum={section.momentum}" if name == "sgd" else None
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=row.optim, optim_args=momentum)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    ours = recipe_optimizer.OPTIMIZER_CLASSES[row.optim](section)
    assert ours.kind is kind
    assert {**ours.settings, "lr": kwargs["lr"]} == kwargs


def test_the_groups_are_those_of_the_trainer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_for(recipe().model))
    names = {name for name, _ in model.named_parameters()}  # a tied weight once
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    decaying = set(trainer.get_decay_parameter_names(model))
    ours = recipe_optimizer.parameter_groups(model, 0.1)[0]["params"]
    assert {
        name for name, parameter in model.named_parameters() if any(parameter is p for p in ours)
    } == decaying & names


# The command.


def _file(folder: Path, **settings: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": {"name": gpt2()}, "data": {"max_length": 128}, **settings}))
    return str(path)


def test_the_command_says_yes_with_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([_file(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["fits"]
    assert document["on_card_bytes"] == sum(document["categories"].values())


def test_the_command_says_no_with_exit_code_1_and_what_would_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MAX_SUGGESTIONS", 1)
    file = _file(tmp_path, train={"per_device_train_batch_size": 64})
    assert command.main([file, "memory.limit_mib=405"]) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "train.per_device_train_batch_size=" in shown


def test_a_model_too_large_at_any_setting_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([_file(tmp_path), "memory.limit_mib=301", "--json"]) == 1
    printed, error = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["options"] == []
    assert "or raise memory.limit_mib" in error
    assert "does not fit in 301 MiB with any settings" in error
    assert "Traceback" not in error


def test_a_card_that_is_not_in_the_table_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([_file(tmp_path), "memory.gpu=rtx-2050-laptop"]) == 2
    assert "Did you mean 'rtx-2050-laptop-4gb'?" in capsys.readouterr().err


def test_two_recipes_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path)
    assert command.main(["--compare", file, file]) == 0
    assert "+0" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["a.yaml", "--compare", "b.yaml", "c.yaml"]])
def test_the_command_wants_one_thing_at_a_time(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert "give one recipe" in capsys.readouterr().err


def test_a_plan_follows_the_configuration_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = []
    for layers in (1, 2):
        place = tmp_path / str(layers)
        GPT2Config(n_layer=layers, n_embd=32, n_head=2, vocab_size=64, n_positions=64).save_pretrained(place / "gpt2")
        monkeypatch.chdir(place)
        local = Recipe.model_validate({"model": {"name": "gpt2"}, "data": {"max_length": 32}})
        parameters.append(make_plan(local).parameters)
    GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=64).save_pretrained("gpt2")
    parameters.append(make_plan(local).parameters)
    assert len(set(parameters)) == 3


@pytest.mark.parametrize("option", command.MOVED_OPTIONS)
def test_an_option_that_moved_says_where(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([option, "measured.csv"])
    assert stopped.value.code == 2
    assert "python -m benchmarks.validation" in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert command.main([_file(tmp_path), "--plot", str(tmp_path / "out.png")]) == 2
    assert "pip install 'lowvram-chat[plot]'" in capsys.readouterr().err


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    assert command.main([_file(tmp_path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["out.xyz", "nowhere/out.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_planning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([_file(tmp_path), "--plot", str(tmp_path / name)]) == 2
    assert "--plot: " in capsys.readouterr().err


def test_a_budget_that_only_short_rows_fit_is_answered_with_short_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SAFETY_MARGIN_BYTES", 0)
    file = _file(tmp_path, data={"max_length": 1024})
    assert command.main([file, "memory.limit_mib=347"]) == 1
    assert "data.max_length=" in capsys.readouterr().out
