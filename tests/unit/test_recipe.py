"""A wrong recipe is refused with all its problems, each with its path, its value and the most similar known name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_chat.errors import NotFoundError, RecipeError, UsageError
from lowvram_chat.recipe.adapters import REFUSED_ADAPTERS, REFUSED_TARGETS
from lowvram_chat.recipe.yaml_file import RENAMED_SETTINGS, load_recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> str:
    """Return the message with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    message = problems(
        tmp_path,
        """
model: {nam: gpt2, dropout: 1.5}
adapter: {kind: lorra}
data: {max_length: 2048, format: mesages}
train: {precision: fp17, learning_rate: fast, max_steps: 0}
optimizer: {name: adam_8bit}
memory: {gpu: rtx-3050}
""",
    )
    assert "10 problems" in message.splitlines()[0]
    for path, words in {
        "model.nam": "Did you mean 'name'?",
        "model.dropout": "1.5",
        "adapter.kind": "Did you mean 'lora'?",
        "data.max_length": "2048",
        "data.format": "Did you mean 'messages'?",
        "train.precision": "Did you mean 'fp16'?",
        "train.learning_rate": "'fast'",
        "train.max_steps": "0",
        "optimizer.name": "Did you mean 'adamw_8bit'?",
        "memory.gpu": "Did you mean 'rtx-3050-8gb'?",
    }.items():
        line = next(line for line in message.splitlines() if line.strip().startswith(f"{path}:"))
        assert words in line


def test_each_problem_is_one_line_with_its_path(tmp_path: Path) -> None:
    message = problems(tmp_path, "train: {precision: fp17}\ndata: {loss_on: user}\n")
    lines = message.splitlines()
    assert lines[0].endswith("2 problems in the recipe.")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["data.loss_on", "train.precision"]
    assert all(line.endswith((".", "?")) for line in lines[1:])


def test_settings_that_exclude_each_other_are_all_named(tmp_path: Path) -> None:
    message = problems(
        tmp_path,
        "model: {load_in: 4bit, dtype: float16}\n"
        "data: {eval_split: test, eval_fraction: 0.1}\n"
        "optimizer: {name: sgd, beta1: 0.8}\n",
    )
    assert "4 problems" in message
    for path in ("model.load_in:", "model.dtype:", "data:", "optimizer.beta1:"):
        assert path in message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data: {eval_source: a.jsonl, eval_split: test}\n", "data:"),
        ("data: {eval_source: a.jsonl, eval_fraction: 0.1}\n", "data:"),
        ("data: {rows: packed, attention_mask: true}\n", "data.attention_mask:"),
        ("adapter: {kind: pissa}\nmodel: {load_in: 4bit}\n", "adapter.kind:"),
        ("train: {fp16_accumulation: true, precision: bf16}\n", "train.fp16_accumulation:"),
        ("train: {fp16_accumulation: true, precision: fp32}\n", "train.fp16_accumulation:"),
        *((f"optimizer: {{name: sgd, {name}: 0.5}}\n", f"optimizer.{name}:") for name in ("beta1", "beta2", "eps")),
        ("optimizer: {name: adamw, momentum: 0.5}\n", "optimizer.momentum:"),
    ],
)
def test_two_settings_that_exclude_each_other_are_refused(tmp_path: Path, text: str, path: str) -> None:
    message = problems(tmp_path, text)
    assert "1 problem in" in message
    assert path in message


@pytest.mark.parametrize("key", ["learning_rat", "strategy", "lists", "functional"])
def test_an_unknown_setting_is_named_with_its_whole_path(tmp_path: Path, key: str) -> None:
    assert f"train.{key}: there is no such setting." in problems(tmp_path, f"train: {{{key}: 1}}\n")


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    assert "optimiser: there is no such setting. Did you mean 'optimizer'?" in problems(
        tmp_path, "optimiser: {name: sgd}"
    )


def test_a_section_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    assert "train:" in problems(tmp_path, "train: 5\n")


def test_a_recipe_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    assert "and this is a list" in problems(tmp_path, "- 1\n- 2\n")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "+3e-4", "0.0003"])
def test_a_number_with_exponent_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path, f"train: {{learning_rate: {text}}}\n")).train.learning_rate == pytest.approx(
        3e-4
    )


@pytest.mark.parametrize("text", ["1e400", ".inf", ".nan"])
def test_a_learning_rate_that_is_no_finite_number_is_refused(tmp_path: Path, text: str) -> None:
    assert "train.learning_rate" in problems(tmp_path, f"train: {{learning_rate: {text}}}\n")


def test_wrong_yaml_is_refused_with_line_and_column(tmp_path: Path) -> None:
    assert "r.yaml:3:7: not valid YAML" in problems(tmp_path, "train:\n  a: [1,\ndata: }\n")


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    message = problems(tmp_path, "train:\n  seed: 1\n  max_steps: 2\n  seed: 3\n")
    assert "r.yaml:4:3" in message
    assert "'seed' is given twice" in message


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{a: 1}: 2\n", "1: 2\n"])
def test_a_key_that_is_no_word_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    assert "r.yaml" in problems(tmp_path, text)


def test_python_tags_are_not_executed(tmp_path: Path) -> None:
    assert "not valid YAML" in problems(tmp_path, "model: !!python/object/apply:os.getcwd []\n")


def test_a_file_that_is_not_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81model")
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufefftrain: {seed: 7}\n".encode())
    assert load_recipe(path).train.seed == 7


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "quickstart.yaml").write_text("", encoding="utf-8")
    with pytest.raises(NotFoundError, match=r"Did you mean 'quickstart\.yaml'\?"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""))
    assert recipe.model.name == "openai-community/gpt2"
    assert recipe.adapter is None


def test_overrides_replace_and_add_settings(tmp_path: Path) -> None:
    words = ["train.learning_rate=3e-5", "adapter.r=4", "data.source=[a.jsonl, b.jsonl]", "model.dropout=null"]
    recipe = load_recipe(write(tmp_path, "train: {learning_rate: 1}\nmodel: {dropout: 0.1}\n"), words)
    assert recipe.train.learning_rate == pytest.approx(3e-5)
    assert recipe.adapter is not None
    assert recipe.adapter.r == 4
    assert recipe.data.source == ["a.jsonl", "b.jsonl"]
    assert recipe.model.dropout is None


def test_an_override_takes_a_section_away(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "adapter: {kind: dora}\n"), ["adapter=null"]).adapter is None


@pytest.mark.parametrize("word", ["train", "train.seed", "=1", ".seed=1", "train.=1", "--seed=1x", "model.name.x=1"])
def test_a_word_that_is_no_override_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises((UsageError, RecipeError)) as caught:
        load_recipe(write(tmp_path, "model: {name: gpt2}\n"), [word])
    assert word in str(caught.value) or "problem" in str(caught.value)


def test_a_wrong_override_is_reported_like_a_wrong_recipe(tmp_path: Path) -> None:
    assert "train.precision: 'fp8'" in problems(tmp_path, "", "train.precision=fp8")


@pytest.mark.parametrize("kind", REFUSED_ADAPTERS)
def test_adapters_that_fail_on_gpt2_are_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    message = problems(tmp_path, f"adapter: {{kind: {kind}}}\n")
    assert f"'{kind}' {REFUSED_ADAPTERS[kind]}" in message
    assert "known: lora, rslora, dora, pissa" in message


@pytest.mark.parametrize("target", REFUSED_TARGETS)
def test_targets_that_merge_wrongly_are_refused_with_the_reason(tmp_path: Path, target: str) -> None:
    assert REFUSED_TARGETS[target] in problems(tmp_path, f"adapter: {{target_modules: [c_attn, {target}]}}\n")


def test_a_recipe_cannot_be_changed_after_it_was_checked(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


def test_the_settings_of_version_0_1_0_are_known_by_their_old_names() -> None:
    lean = {"model.lean_gelu", "model.lean_loss", "model.lean_attention", "adapter.lean"}
    assert lean <= RENAMED_SETTINGS.keys()


@pytest.mark.parametrize(("old", "new"), RENAMED_SETTINGS.items())
def test_a_renamed_setting_is_answered_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("adapter: {kind: lora}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=f"{old}: this setting is called {new} now"):
        load_recipe(path, [f"{old}=true"])
    section, _, key = new.partition(".")
    assert getattr(load_recipe(path, [f"{new}=false"]), section).model_dump()[key] is False
